"""What saving and loading cost in CPU time: this tree beside an older one, in pairs.

    git worktree add /tmp/before e0d2209
    python benchmarks/checkpoint_pairs.py /tmp/before     writes benchmarks/results/checkpoint_pairs.json and .md

As ``step_python.py``: each tree is a process of its own, they take turns. CPU time is that of all threads of the
process (``time.process_time``): checksums and fsyncs have their own. Beside it, how often one save waits for the disk.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from provenance import commit, write_result
from step_python import compare

RESULTS = Path(__file__).parent / "results"
#: name -> (work, tensors, elements of each)
SCENARIOS: dict[str, tuple[str, int, int]] = {
    "save, 300 small tensors": ("save", 300, 64 * 64),
    "load, 300 small tensors": ("load", 300, 64 * 64),
    "save, 200 MB": ("save", 4, 4096 * 1024),
    "load, 200 MB": ("load", 4, 4096 * 1024),
    "fsyncs of a save": ("fsync", 3, 64 * 64),
}


def worker(name: str, folder: Path) -> None:
    """Answers each line of its input with the seconds of a turn."""
    import time

    import torch

    import memopt

    what, count, numel = SCENARIOS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(64, numel // 64)) for _ in range(count))
    opt = memopt.create(model, "adamw")
    for p in model:
        p.grad = torch.randn_like(p)
    opt.step()
    waits = 0

    def counted(sync: Any) -> Any:
        def call(handle: int) -> None:
            nonlocal waits
            waits += 1
            sync(handle)

        return call

    if what == "fsync":
        os.fsync, os.fdatasync = counted(os.fsync), counted(os.fdatasync)

    def turn() -> float:
        nonlocal waits
        waits, begin = 0, time.process_time()
        if what == "load":
            memopt.load(folder, model=model, optimizer=opt)
        else:
            memopt.save(folder, model=model, optimizer=opt)
        return waits / 1e3 if what == "fsync" else time.process_time() - begin

    memopt.save(folder, model=model, optimizer=opt)
    turn()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() != "go":
            return
        print(turn(), flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", nargs="?", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--only", default="", help="scenarios with this in their name")
    parser.add_argument("--worker", help="used by itself")
    args = parser.parse_args()
    if args.worker:
        with TemporaryDirectory() as folder:
            worker(args.worker, Path(folder))
        return
    found = {}
    for name, (what, _, _) in SCENARIOS.items():
        if args.only in name:
            with TemporaryDirectory() as scratch:
                pairs = 2 if what == "fsync" else args.pairs
                found[name] = compare(args.before.resolve(), name, pairs, Path(scratch), 1, __file__)
            print(name, found[name], flush=True)
    if args.only:
        return
    record = {"before": commit(args.before), "scenarios": found}
    write_result(RESULTS / "checkpoint_pairs.json", record)
    (RESULTS / "checkpoint_pairs.md").write_text(table(record))


def table(record: dict[str, Any]) -> str:
    rows = []
    for name, one in record["scenarios"].items():
        if "fsync" in name:
            rows.append(f"| {name} | {one['before_ms']:.0f} | {one['here_ms']:.0f} | | |")
        else:
            low, high = one["quarters"]
            figures = (
                f"{one['before_ms']:.1f} ms | {one['here_ms']:.1f} ms | {one['ratio']:.3f} | {low:.3f} to {high:.3f}"
            )
            rows.append(f"| {name} | {figures} |")
    lines = [
        f"# CPU time of saving and loading: {commit()[:10]} beside {record['before'][:10]}",
        "",
        "`benchmarks/checkpoint_pairs.py`, one thread. The ratio is the median over pairs, with the quarters.",
        "",
        "| work | before | here | ratio | quarters |",
        "|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
