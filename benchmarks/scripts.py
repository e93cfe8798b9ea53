"""Public training scripts as their repositories have them, with one or two lines changed: torch's optimizer, memopt's.

    python benchmarks/scripts.py FOLDER      writes benchmarks/results/scripts.json and .md
    python benchmarks/scripts.py --diffs     prints the lines that change, as docs/frameworks.md shows them

FOLDER holds what is not ours and is not copied here, under the names of ``benchmarks/scripts_table.py``, which says
the repository and the commit of each; TRL's is the one of the installed package. Each is run as it is and with its
lines changed, on models of a few thousand weights and on made-up data (``benchmarks/scripts_run.py`` says what stands
in for the network), and must end without an error, have stepped the spec and no other optimizer, and have brought the
loss down. ``adamw`` must have the unchanged script's losses within 1e-5; what 8 bits differ by is written down. Where a
script saves and resumes, it does so by its own options, and its losses after that are those of the run that was not
interrupted, to the bit; of nanoGPT, which draws other batches after it, those of the unchanged script.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from provenance import commit, write_result
from scripts_table import SCRIPTS, Change, Script

RESULTS = Path(__file__).parent / "results" / "scripts.json"
BAR, SECONDS = 1e-5, 150
TORCH = "as it is"


def changed(script: Script, spec: str) -> tuple[Change, ...]:
    """What changes for a spec. The file of DeepSpeed's changes whoever steps: as it is, it runs DeepSpeed's own Adam,
    whose compilation takes a minute, in the place of the script's optimizer; so that is what it is compared with."""
    if script.beside != ("ds_z2_offload_config.json",):
        return script.changes if spec != TORCH else ()
    more = next(s for s in SCRIPTS if s.name == "transformers' run_clm").changes
    return script.changes if spec == TORCH else (*script.changes, *more)


def write(script: Script, spec: str, source: Path, folder: Path) -> Path:
    """The script with its lines changed, in ``folder``."""
    for name in (script.file, *script.beside):
        text = original(source, name).read_text()
        for change in changed(script, spec):
            if change.file == name:
                if text.splitlines().count(change.line) != 1:
                    raise SystemExit(f"{name}: no line, or more than one, is {change.line!r}")
                text = text.replace(f"{change.line}\n", "\n".join(change.lines).format(spec=spec) + "\n")
        (folder / Path(name).name).write_text(text)
    return folder / Path(script.file).name


def original(source: Path, name: str) -> Path:
    trl = find_spec("trl")
    if name == "sft.py" and trl is not None and trl.origin:
        return Path(trl.origin).parent / "scripts" / "sft.py"
    return source / name


def launched(script: Script, path: Path, arguments: str, what: str) -> dict[str, Any]:
    """Run it; of several ranks, the first one's losses."""
    import scripts_run

    context, processes = multiprocessing.get_context("forkserver"), []
    for rank in range(script.ranks):
        environment = dict(script.environment)
        if script.ranks > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": script.ranks, "LOCAL_SIZE": script.ranks}
            environment |= {name: str(value) for name, value in ranks.items()}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(29600 + os.getpid() % 1000)}
        to = [str(path.parent / f"{what}{rank}.{end}") for end in ("log", "json")]
        processes.append(
            context.Process(target=scripts_run.run, args=(str(path), arguments.split(), environment, *to), daemon=True)
        )
        processes[-1].start()
    for process in processes:
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
    result = path.parent / f"{what}0.json"
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {"code": "none", "losses": []}
    found["code"] = max((abs(p.exitcode or 0) if p.exitcode is not None else 124) for p in processes) or found["code"]
    if found["code"]:
        print((path.parent / f"{what}0.log").read_text()[-3000:], file=sys.stderr)
    return found


def run(script: Script, spec: str, source: Path, data: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(data, folder, dirs_exist_ok=True)
        path = write(script, spec, source, Path(folder))
        found = launched(script, path, script.arguments, "first")
        if script.resume and not found["code"]:
            again = launched(script, path, f"{script.arguments} {script.resume}", "again")
            found |= {"resumed": again["losses"], "resumed_code": again["code"], "resumed_by": again.get("stepped")}
    return found


def judged(script: Script, spec: str, found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """One row: what was seen, and whether it is right."""
    losses, third = found["losses"], max(1, len(found["losses"]) // 3)  # the epochs of nlp_example
    means = [sum(some) / third for some in (losses[:third], losses[-third:])] if losses else []
    row: dict[str, Any] = {
        "script": script.name,
        "source": script.source,
        "commit": commit(),
        "spec": spec,
        "code": found["code"],
        "stepped": found.get("stepped", {}),
        "state_bytes": found.get("state"),
        "losses": means,
        "falls": means[-1:] < means[:1],
        "difference": difference(losses, plain["losses"]),
    }
    who = {"memopt"} if spec != TORCH else {name.split()[0] for name in plain.get("stepped", {})}
    right = not row["code"] and row["falls"] and {name.split()[0] for name in row["stepped"]} == who
    right &= spec == TORCH or {name.split()[1] for name in row["stepped"]} == {spec}
    right &= spec not in ("adamw", "sgd") or row["difference"] <= BAR
    if script.resume and not row["code"]:
        before = losses[-len(found["resumed"]) :] if script.tail else plain["resumed"]
        row["resumed"] = difference(found["resumed"], before)
        right &= not found["resumed_code"] and len(found["resumed"]) > 0
        right &= spec not in ("adamw", TORCH) or row["resumed"] <= (0.0 if script.tail else BAR)
    return row | {"right": right}


def difference(losses: list[float], others: list[float]) -> float:
    if len(losses) != len(others) or not losses:
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def diffs() -> str:
    """The lines that change, as a reader would type them."""
    lines = []
    for script in SCRIPTS:
        spec = script.specs[-1]
        lines += [f"**{script.name}**", "", "```diff"]
        for change in script.changes:
            new = [line.format(spec=spec).strip() for line in change.lines]
            old = change.line.strip()
            found = [] if old in new else [f"-{old}"]
            found += [f"{' ' if line == old else '+'}{line}" for line in new]
            lines += [" {", *found, " }"] if change.file.endswith(".json") else found
        lines += ["```", ""]
    return "\n".join(lines)


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Public scripts",
        "",
        "Each as its repository has it, with the lines of [By framework](../../docs/frameworks.md#public-scripts) "
        "changed, on a tiny model and made-up data. By `benchmarks/scripts.py`, which says where each comes from.",
        "",
        "| script | optimizer | loss, first and last third | largest relative difference | state, bytes | resumed |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        losses = " to ".join(f"{x:.3f}" for x in r["losses"])
        resumed = "" if "resumed" not in r else "bit for bit" if r["resumed"] == 0 else f"{r['resumed']:.1e}"
        wrong = "" if r["right"] else " **wrong**"
        lines.append(
            f"| {r['script']} | {'its own' if r['spec'] == TORCH else '`' + r['spec'] + '`'}{wrong} | {losses} | "
            f"{'' if r['spec'] == TORCH else format(r['difference'], '.1e')} | {r['state_bytes'] or 0:,} | {resumed} |"
        )
    lines += [
        "",
        "Resumed: the losses after the checkpoint against those of the run that was not interrupted; nanoGPT draws "
        "other batches then, and is held against the unchanged script.",
    ]
    return "\n".join(lines) + "\n"


def keep(rows: list[dict[str, Any]], path: Path) -> None:
    """Write these rows in the place of those of the same scripts, and leave the others."""
    new, names = {row["script"] for row in rows}, [script.name for script in SCRIPTS]
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    everything = sorted(
        [*rows, *(row for row in known if row["script"] not in new)], key=lambda row: names.index(row["script"])
    )
    write_result(path, {"bar": BAR, "rows": everything})
    path.with_suffix(".md").write_text(page(everything))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the scripts are")
    parser.add_argument("--only", default="", help="scripts whose name contains this; the other rows stay as they are")
    parser.add_argument("--diffs", action="store_true", help="print the lines that change, and run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.diffs or arguments.folder is None:
        print(diffs())
        return 0
    sys.argv = [one for one in sys.argv if one != str(arguments.folder)] + ["FOLDER"]  # as the results have it
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    multiprocessing.set_forkserver_preload(["torch", "datasets", "transformers", "accelerate", "memopt", "scripts_run"])
    import scripts_run

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as data:
        os.environ["HF_HOME"] = f"{data}/cache"
        scripts_run.prepare(Path(data))
        for script in (s for s in SCRIPTS if arguments.only in s.name):
            plain: dict[str, Any] = {}
            for spec in (TORCH, *script.specs):
                found = run(script, spec, arguments.folder, Path(data))
                plain = plain or found
                rows.append(judged(script, spec, found, plain))
                print(rows[-1], flush=True)
            keep(rows, arguments.out)
    print(page(rows))
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
