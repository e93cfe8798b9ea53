"""A new machine: how long the packages take to install and to make their first step, with and without a compiler.

    python benchmarks/install.py

Made from a fresh clone of the commit that is checked out: the source distribution, from it a wheel with the kernels.
Each installation is into an empty environment that has torch (that of the running Python, whose other packages are
there too) and no memopt, with a PATH in which nothing but that Python is where there is to be no compiler, and with an
empty cache of kernels. Two to four minutes, most of it two compilations of the kernels. Results:
``results/install.json`` and ``install.md``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import torch
from provenance import write_result

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIRST_STEP = """
import json, time
begin = time.perf_counter()
import torch
imported = time.perf_counter() - begin
import memopt
from memopt import kernels
begin = time.perf_counter()
model = torch.nn.Linear(1000, 1000)
opt = memopt.create(model, "adamw-8bit", lr=1e-3)
model(torch.ones(4, 1000)).sum().backward()
opt.step()
step = time.perf_counter() - begin
print(json.dumps({"import_torch_s": imported, "first_step_s": step, "kernels": kernels.on_cpu()}))
"""
#: Bars of the issue that asked for these figures: seconds of the wheel without a compiler.
MOST_INSTALL, MOST_FIRST_STEP = 20.0, 1.0


def torch_alone(folder: Path) -> Path:
    """A folder with links to what stands beside torch, without memopt."""
    beside = Path(torch.__file__).parents[1]
    folder.mkdir()
    for entry in beside.iterdir():
        name = entry.name.lower().lstrip("_")
        if "memopt" not in name and not name.startswith(("pip", "estimators")) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def environment(folder: Path, packages: Path) -> Path:
    """An environment with pip and ``packages``; its Python."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "beside.pth").write_text(f"{packages}\n")
    return python


def run(python: Path, *argv: str, compiler: bool, scratch: Path) -> tuple[float, str]:
    """Seconds of a command in an environment, and what it printed."""
    path = [str(python.parent), *([os.environ["PATH"]] if compiler else [])]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "MEMOPT_KERNELS", "MEMOPT_CACHE")}
    env |= {"PATH": os.pathsep.join(path), "MEMOPT_CACHE": str(scratch / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    begin = time.perf_counter()
    done = subprocess.run([str(python), *argv], env=env, cwd=scratch, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}\n{done.stdout}{done.stderr}")
    return seconds, done.stdout


def tried(name: str, package: Path, compiler: bool, packages: Path, scratch: Path) -> dict[str, object]:
    """A package installed into an environment of its own, and its first step."""
    here = scratch / name.replace(" ", "-")
    here.mkdir()
    python = environment(here / "env", packages)
    how = ("install", "--quiet", str(package))
    installed, _ = run(python, "-m", "pip", *how, compiler=compiler, scratch=here)
    _, said = run(python, "-c", FIRST_STEP, compiler=compiler, scratch=here)
    _, doctor = run(python, "-m", "memopt", "estimate", "8B", "--json", compiler=compiler, scratch=here)
    assert json.loads(doctor)["schema"].startswith("memopt.estimate/")
    return {"what": name, "compiler": compiler, "install_s": round(installed, 1), **json.loads(said)}


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| package | compiler | install | first step | CPU kernels |", "|---|---|---:|---:|---|"]
    for row in rows:
        lines.append(
            f"| {row['what']} | {'yes' if row['compiler'] else 'none'} | {row['install_s']} s | "
            f"{row['first_step_s']:.2f} s | {row['kernels']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        packages = torch_alone(scratch / "beside")
        maker = environment(scratch / "maker", packages)
        here = Path(sys.executable)
        clone = scratch / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        script = f"import os; os.chdir({str(clone)!r}); from setuptools import build_meta as b; "
        script += f"print(b.build_sdist({folder!r}))"
        _, said = run(here, "-c", script, compiler=True, scratch=scratch)
        sdist = scratch / said.splitlines()[-1]
        make = ("-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, str(sdist))
        compiled, _ = run(maker, *make, compiler=True, scratch=scratch)
        (wheel,) = scratch.glob("memopt-*.whl")
        sizes = {path.name: path.stat().st_size for path in (sdist, wheel)}
        rows = [
            tried("wheel", wheel, False, packages, scratch),
            tried("source distribution", sdist, True, packages, scratch),
            tried("pure source distribution", sdist, False, packages, scratch),
        ]
    result = {"rows": rows, "sizes": sizes, "making_the_wheel_s": round(compiled, 1)}
    write_result(RESULTS / "install.json", result)
    (RESULTS / "install.md").write_text(table(rows))
    print(table(rows))
    slow = rows[0]["install_s"] > MOST_INSTALL or rows[0]["first_step_s"] > MOST_FIRST_STEP
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
