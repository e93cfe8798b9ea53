"""Hostile inputs by the hundred thousand at every reader and the command line: does any of them do harm?

    python benchmarks/fuzz.py --inputs 100000 --out benchmarks/results/fuzz.json

Inputs are well-formed checkpoints, files and configurations, changed where their structure says
(``tests/helpers/fuzzing.py``), each from the seed and its number: ``--first N --inputs 1`` repeats one. Each is given
to one reader: ``memopt inspect``, ``convert``, ``estimate``, ``estimate --from`` or ``memopt.load``. The harness
(``tests/helpers/fuzzing_harness.py``) looks by the interpreter's audit events at what is opened, changed, executed and
reached; at time of the process and memory beyond the input's own size; at what is said. Its own test
(``tests/untrusted/test_untrusted_fuzz.py``) does each of these wrong once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from provenance import write_result

TESTS = Path(__file__).parent.parent / "tests"


def part(seed: int, first: int, count: int) -> dict[str, Any]:
    """A range of inputs, in this process: its audit hook stays."""
    sys.path.insert(0, str(TESTS.parent))
    import torch

    from tests.helpers import fuzzing_harness

    torch.set_num_threads(1)
    watch = fuzzing_harness.Watch()
    fuzzing_harness.limited()
    with tempfile.TemporaryDirectory() as directory:
        fuzzer = fuzzing_harness.Fuzzer(seed, Path(directory), watch)
        fuzzer.run(first, count)
    return {
        "counts": dict(fuzzer.counts),
        "failures": fuzzer.failures,
        "slowest_s": fuzzer.slowest,
        "largest_nbytes": fuzzer.largest,
    }


def everything(seed: int, first: int, inputs: int, processes: int, batch: int) -> dict[str, Any]:
    """All inputs, in processes of ``batch`` each, so that none grows old."""
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    slowest, largest = 0.0, 0
    todo = [(at, min(batch, first + inputs - at)) for at in range(first, first + inputs, batch)]
    running: list[subprocess.Popen[str]] = []
    while todo or running:
        while todo and len(running) < processes:
            at, count = todo.pop(0)
            command = [sys.executable, "-W", "ignore", __file__, "--part", str(seed), str(at), str(count)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        process = running.pop(0)
        out = process.communicate()[0]
        if process.returncode:
            failures.append({"problem": f"the process ended with {process.returncode}", "batch": process.args[-2:]})
            continue
        found = json.loads(out.splitlines()[-1])
        counts.update(found["counts"])
        failures += found["failures"]
        slowest, largest = max(slowest, found["slowest_s"]), max(largest, int(found["largest_nbytes"]))
        print(f"{counts['inputs']:,} inputs, {len(failures)} failures", file=sys.stderr, flush=True)
    return {
        "seed": seed,
        "first": first,
        "inputs": counts.pop("inputs", 0),
        "outcomes": dict(sorted(counts.items())),
        "failures": failures,
        "slowest_s": round(slowest, 3),
        "largest_mib_beyond_the_input": round(largest / 2**20, 1),
    }


def table(found: dict[str, Any]) -> str:
    rows: dict[str, Counter[str]] = {}
    for outcome, count in found["outcomes"].items():
        reader, _, how = outcome.rpartition(": ")
        column = {"exit code 0": "read", "read": "read", "exit code 1": "read", "a trace": "a trace"}.get(
            how, "refused"
        )
        rows.setdefault(reader, Counter())[column] += count
    lines = ["| reader | inputs | read | one sentence | a trace |", "|---|---|---|---|---|"]
    for reader, counted in rows.items():
        counts = [sum(counted.values()), counted["read"], counted["refused"], counted["a trace"]]
        lines.append(f"| {reader} | " + " | ".join(f"{n:,}" for n in counts) + " |")
    return "\n".join(
        [
            "# Hostile inputs",
            "",
            f"`benchmarks/fuzz.py`, seed {found['seed']}, {found['inputs']:,} inputs, each given to one reader.",
            "",
            *lines,
            "",
            "Written, read or changed outside the input's folder, executed, or with control characters in what was "
            f"said, over one second, or over 64 MiB beyond the input's size: {len(found['failures'])} of them.",
            f"The slowest took {found['slowest_s']:.2f} s of the process' time, the largest "
            f"{found['largest_mib_beyond_the_input']:.1f} MiB beyond the input's size.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=20261130)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=2500)
    parser.add_argument("--out", type=Path, help="JSON; a table goes beside it")
    parser.add_argument("--part", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(part(*args.part)))
        return 0
    found = everything(args.seed, args.first, args.inputs, args.processes, args.batch)
    if args.out:
        write_result(args.out, found)
        args.out.with_suffix(".md").write_text(table(found))
    print(table(found))
    for failure in found["failures"][:20]:
        print(failure)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
