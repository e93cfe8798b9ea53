"""Kill a process at every system call of a save, a conversion, an export and an @disk commit: old or new, never less.

    python benchmarks/kill_every_call.py --out benchmarks/results/kill_every_call.json

Each scenario begins from a folder as an earlier run left it. A child does the work and is killed (SIGKILL) before its
first call that changes a file system, then before its second, and so on to the last; every write once more after half
of its bytes. What is there then must be what was there before or what the work makes, whole, and the same work must
succeed afterwards and leave nothing else behind. On two ranks one is killed; the other has to end by itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import system_calls
from checkpoint_sweep import require
from kill_scenarios import Convert, Disk, Export, Ranks, Save, Scenario, copy_of
from provenance import write_result


def sweep_ranks(scenario: Ranks, folder: Path, every: int = 1) -> dict[str, Any]:
    template, here = folder / "template", folder / "here"
    scenario.prepare(template)
    copy_of(template, here)
    whole, code = scenario.run(here, 2.0, 0)
    require(whole.status == 0 and code == 0, f"{scenario.name}: the work fails")
    outcomes: Counter[str] = Counter()
    at: Counter[str] = Counter()
    for number in range(1, whole.calls.total() + 1, every):
        copy_of(template, here)
        trace, code = scenario.run(here, 2.0, number)
        if not os.WIFSIGNALED(trace.status):
            continue
        what = f"{scenario.name}, killed before call {number} ({trace.last})"
        try:
            require(code >= 0, "the other rank did not end")
            outcomes[scenario.found(here)] += 1
            again, code = scenario.run(here, 2.0, 0)
            require(again.status == 0 and code == 0, "the work fails afterwards")
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        at[trace.last] += 1
    return {"calls": dict(whole.calls), "kills": outcomes.total(), "at": dict(at), "outcomes": dict(outcomes)}


def sweep(scenario: Scenario, folder: Path, every: int = 1, torn: bool = True) -> dict[str, Any]:
    """Outcomes of kills at every ``every``-th call. Raises AssertionError for what is neither old nor new."""
    template, here = folder / "template", folder / "here"
    scenario.prepare(template)
    copy_of(template, here)
    whole = system_calls.killed_at(lambda: scenario.work(here), 0)
    require(os.WIFEXITED(whole.status) and not os.WEXITSTATUS(whole.status), f"{scenario.name}: the work fails")
    require(scenario.read(here) == "new", f"{scenario.name}: the work does nothing")
    outcomes: Counter[str] = Counter()
    at: Counter[str] = Counter()
    for number in range(1, whole.calls.total() + 1, every):
        for tear in (False, True) if torn else (False,):
            copy_of(template, here)
            trace = system_calls.killed_at(lambda: scenario.work(here), number, tear)
            if tear and trace.last not in ("write", "pwrite64"):
                continue
            if not os.WIFSIGNALED(trace.status):
                continue  # threads reached the end with a call less
            what = f"{scenario.name}, killed {'in' if tear else 'before'} call {number} ({trace.last})"
            try:
                outcomes[scenario.read(here)] += 1
                again = system_calls.killed_at(lambda: scenario.work(here), 0)
                require(not os.WEXITSTATUS(again.status), "the work fails afterwards")
                require(scenario.clean(here), f"left behind: {sorted(p.name for p in here.rglob('*'))}")
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
            at[trace.last] += 1
    return {"calls": dict(whole.calls), "kills": outcomes.total(), "at": dict(at), "outcomes": dict(outcomes)}


SCENARIOS: list[Scenario] = [
    Save("save"),
    Save("save, keep=1", keep=1),
    Save("save, asynchronous", asynchronous=True),
    Convert(),
    *(Export(tool) for tool in ("torch", "torchao", "dcp", "deepspeed")),
    Disk("@disk, the first step", 0),
    Disk("@disk, a step", 2),
    *(Ranks(victim, "save") for victim in range(2)),
    *(Ranks(victim, "save, asynchronous", asynchronous=True) for victim in range(2)),
    *(Ranks(victim, "a step of @disk") for victim in range(2)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    reason = system_calls.available()
    require(reason is None, str(reason))
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    failed = 0
    for scenario in SCENARIOS:
        if arguments.only in scenario.name:
            begin = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    run = sweep_ranks if isinstance(scenario, Ranks) else sweep
                    rows[scenario.name] = run(scenario, Path(folder), arguments.every)  # type: ignore[operator]
                except AssertionError as error:
                    rows[scenario.name] = {"failed": str(error)}
                    failed += 1
            print(f"{scenario.name}: {rows[scenario.name]} {time.monotonic() - begin:.0f} s", flush=True)
    if arguments.out:
        write_result(arguments.out, {"rows": rows})
        arguments.out.with_suffix(".md").write_text(table(rows))
    sys.exit(failed > 0)


def table(rows: dict[str, Any]) -> str:
    lines = [
        "# Killed at every system call",
        "",
        "`benchmarks/kill_every_call.py`: how often a process was killed before a call that changes a file system, or",
        "in the middle of a write, and whether what it left was as before or as after; anything else fails.",
        "",
        "| work | calls | kills | old | new |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | | | failed: {row['failed']} | |")
            continue
        outcomes = row["outcomes"]
        numbers = sum(row["calls"].values()), row["kills"], *(outcomes.get(kind, 0) for kind in ("old", "new"))
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
