"""A new machine: how long the packages take to install and to make their first step, with and without a compiler.

    python benchmarks/install.py                # three installations where torch is there
    python benchmarks/install.py --with-torch   # and one into an environment with nothing, torch installed as well

Made from a fresh clone of the commit that is checked out: the source distribution, from it a wheel with the kernels.
Each is installed by pip into an environment of its own that has torch and what torch needs (those of the running
Python, linked), and nothing else: psutil and rich come from the package index. Its variables are the system's few, its
home folder and its cache of kernels are empty, pip's cache is not used, and where there is to be no compiler its PATH
has nothing but that Python. Two to four minutes on two cores, most of it two compilations of the kernels. Every command
has a limit. Results: ``results/install.json`` and ``install.md``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib import metadata
from pathlib import Path

from provenance import write_result

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIRST_STEP = """
import json, time
begin = time.perf_counter()
import torch
torch_there = time.perf_counter()
import memopt
memopt_there, cpu = time.perf_counter(), time.process_time()
model = torch.nn.Linear(1000, 1000)
opt = memopt.create(model, "adamw-8bit", lr=1e-3)
model(torch.ones(4, 1000)).sum().backward()
opt.step()
end, cpu = time.perf_counter(), time.process_time() - cpu
from memopt import kernels
print(json.dumps({"import_torch_s": torch_there - begin, "import_memopt_s": memopt_there - torch_there,
                  "first_step_s": end - memopt_there, "first_step_cpu_s": cpu,
                  "kernels": kernels.on_cpu().partition(", from ")[0]}))
"""
#: Bars of the issue that asked for these figures: seconds of the wheel without a compiler.
MOST_INSTALL, MOST_FIRST_STEP = 20.0, 1.0
#: Seconds after which a command is ended.
LIMIT = 600.0
#: Variables that an installation keeps: how its package index is reached.
KEPT = re.compile(r"PIP_|.*_proxy$|SSL_CERT", re.IGNORECASE)


def needed(name: str, found: set[str]) -> set[str]:
    """Names of the distributions here that one needs, itself among them."""
    plain = re.sub(r"[-_.]+", "-", name).lower()
    if plain not in found:
        found.add(plain)
        for line in metadata.requires(plain) or ():
            requirement = re.match(r"[\w.-]+", line)
            if requirement and "extra ==" not in line:
                try:
                    needed(requirement[0], found)
                except metadata.PackageNotFoundError:  # for another platform
                    found.discard(re.sub(r"[-_.]+", "-", requirement[0]).lower())
    return found


def torch_alone(folder: Path) -> Path:
    """A folder with links to torch and what it needs."""
    folder.mkdir()
    for name in needed("torch", set()):
        distribution = metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def environment(folder: Path, packages: Path | None) -> Path:
    """An environment with pip and ``packages``; its Python."""
    venv.create(folder, with_pip=True, symlinks=True)
    if packages is not None:
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "beside.pth").write_text(f"{packages}\n")
    return folder / "bin" / "python"


def run(python: Path, *argv: str, compiler: bool, scratch: Path) -> tuple[float, str]:
    """Seconds of a command in an environment, and what it printed."""
    path = [str(python.parent), *(["/usr/local/bin", "/usr/bin", "/bin"] if compiler else [])]
    env = {name: value for name, value in os.environ.items() if KEPT.match(name)}
    home = scratch / "home"
    home.mkdir(exist_ok=True)
    env |= {"PATH": os.pathsep.join(path), "HOME": str(home), "LANG": "C.UTF-8", "PIP_NO_CACHE_DIR": "1"}
    env |= {"TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    begin = time.perf_counter()
    try:
        done = subprocess.run([str(python), *argv], env=env, cwd=scratch, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"")[-500:].decode(errors="replace")
        raise SystemExit(f"{' '.join(argv)}\nnot done in {LIMIT:.0f} s: {said}") from None
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds, done.stdout


def tried(what: str, package: Path, compiler: bool, packages: Path | None, scratch: Path) -> dict[str, object]:
    """A package installed into an environment of its own, its first step, and one answer of the command line."""
    here = scratch / re.sub(r"\W+", "-", f"{what} {compiler}")
    here.mkdir()
    python = environment(here / "env", packages)
    print(f"{what}, compiler: {compiler}", flush=True)
    installed, said = run(python, "-m", "pip", "install", str(package), compiler=compiler, scratch=here)
    brought = re.findall(r"^Successfully installed (.*)$", said, re.M)[-1].split()
    _, said = run(python, "-c", FIRST_STEP, compiler=compiler, scratch=here)
    answer, estimate = run(python, "-m", "memopt", "estimate", "8B", "--json", compiler=compiler, scratch=here)
    assert json.loads(estimate)["schema"].startswith("memopt.estimate/")
    times = {"install_s": round(installed, 1), "estimate_s": round(answer, 2)}
    first = {k: round(v, 2) if isinstance(v, float) else v for k, v in json.loads(said).items()}
    return {"what": what, "compiler": compiler, "installed": brought, **times, **first}


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "`pip install` of what stands on the left; *first step* is `memopt.create`, a forward and a backward pass and "
        "`step()`, after `import torch` and `import memopt`.",
        "",
        "| package | compiler | pip install | import torch | import memopt | first step | of it on processors "
        "| CPU kernels |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        names = ("install_s", "import_torch_s", "import_memopt_s", "first_step_s", "first_step_cpu_s")
        times = [f"{row[name]} s" for name in names]
        named = "yes" if row["compiler"] else "none"
        lines.append("| " + " | ".join([str(row["what"]), named, *times, str(row["kernels"])]) + " |")
    return "\n".join(lines) + "\n"


def packages_of(scratch: Path, packages: Path) -> tuple[Path, Path, float]:
    """The source distribution and the wheel of a fresh clone, and the seconds that making the wheel took."""
    clone = scratch / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True, timeout=LIMIT)
    maker = environment(scratch / "maker", packages)
    run(maker, "-m", "pip", "install", "--quiet", "build", compiler=True, scratch=scratch)
    begin = time.perf_counter()
    run(maker, "-m", "build", "--outdir", str(scratch), str(clone), compiler=True, scratch=scratch)
    return made(scratch, time.perf_counter() - begin)


def made(folder: Path, seconds: float) -> tuple[Path, Path, float]:
    (sdist,), (wheel,) = folder.glob("memopt-*.tar.gz"), folder.glob("memopt-*.whl")
    return sdist.resolve(), wheel.resolve(), seconds


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--with-torch", action="store_true", help="also into an environment without torch")
    parser.add_argument(
        "--dist", type=Path, metavar="FOLDER", help="packages that make dist made, in place of new ones"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        packages = torch_alone(scratch / "beside")
        sdist, wheel, making = made(args.dist, 0.0) if args.dist else packages_of(scratch, packages)
        sizes = {path.name: path.stat().st_size for path in (sdist, wheel)}
        rows = [
            tried("wheel", wheel, False, packages, scratch),
            tried("source distribution", sdist, True, packages, scratch),
            tried("source distribution", sdist, False, packages, scratch),
        ]
        if args.with_torch:
            rows.append(tried("wheel, and torch from the index", wheel, False, None, scratch))
    there = sorted(needed("torch", set()))
    result = {"rows": rows, "there_before": there, "sizes": sizes, "making_both_s": round(making, 1)}
    result["load_average"] = os.getloadavg()[0]
    write_result(RESULTS / "install.json", result)
    (RESULTS / "install.md").write_text(table(rows))
    print(table(rows))
    return 1 if rows[0]["install_s"] > MOST_INSTALL or rows[0]["first_step_s"] > MOST_FIRST_STEP else 0


if __name__ == "__main__":
    sys.exit(main())
