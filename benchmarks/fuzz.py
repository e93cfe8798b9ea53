"""Hostile inputs by the hundred thousand at every reader and the command line: does any of them do harm?

    python benchmarks/fuzz.py --out benchmarks/results/fuzz.json                    on from there, to 100,000
    python benchmarks/fuzz.py --minutes 10 --out benchmarks/results/fuzz.json       as many of them as fit

Inputs are well-formed checkpoints, files and configurations, changed where their structure says
(``tests/helpers/fuzzing.py``), each from the seed and its number: ``--part SEED N 1`` repeats one. Each is given to one
reader: ``memopt inspect``, ``convert``, ``estimate``, ``estimate --from`` or ``memopt.load``. The harness
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
import time
from collections import Counter
from pathlib import Path
from typing import Any

from provenance import commit, write_result

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


def go_on(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Inputs up to ``args.inputs``, in processes of ``args.batch`` each, so that none grows old."""
    part_of = {"commit": commit(), "first": found["next"], "inputs": 0, "seconds": 0}
    found["parts"].append(part_of)
    start = time.monotonic()
    running: list[subprocess.Popen[str]] = []
    while found["next"] < args.inputs or running:
        late = args.minutes and time.monotonic() - start > 60 * args.minutes
        while not late and found["next"] < args.inputs and len(running) < args.processes:
            count = min(args.batch, args.inputs - found["next"])
            command = [sys.executable, "-W", "ignore", __file__, "--part", *map(str, (args.seed, found["next"], count))]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            found["next"] += count
        if not running:
            break
        process = running.pop(0)
        out = process.communicate()[0]
        if process.returncode:
            one = {"problem": f"the process ended with {process.returncode}", "batch": process.args[-2:]}
            found["failures"].append({**one, "commit": part_of["commit"]})
            continue
        said = json.loads(out.splitlines()[-1])
        inputs = said["counts"].pop("inputs", 0)
        found["inputs"] += inputs
        part_of["inputs"] += inputs
        part_of["seconds"] = round(time.monotonic() - start)
        found["outcomes"] = dict(sorted((Counter(found["outcomes"]) + Counter(said["counts"])).items()))
        found["failures"] += [{**one, "commit": part_of["commit"]} for one in said["failures"]]
        found["slowest_s"] = max(found["slowest_s"], round(said["slowest_s"], 3))
        mib = round(said["largest_nbytes"] / 2**20, 1)
        found["largest_mib_beyond_the_input"] = max(found["largest_mib_beyond_the_input"], mib)
        print(f"{found['inputs']:,} inputs, {len(found['failures'])} failures", file=sys.stderr, flush=True)
        if args.out:  # what is under way is begun again, should this process end
            write_result(args.out, {**found, "next": int(running[0].args[-2]) if running else found["next"]})
            args.out.with_suffix(".md").write_text(table(found))


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
            "| commit | inputs | seconds |",
            "|---|---|---|",
            *(
                f"| {one['commit'][:10]}{' (with changes)' * one['commit'].endswith('+changes')} | {one['first']:,} to "
                f"{one['first'] + one['inputs'] - 1:,} | {one['seconds']:,} |"
                for one in found["parts"]
                if one["inputs"]
            ),
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
    parser.add_argument("--inputs", type=int, default=100_000, help="in all, those of earlier parts counted in")
    parser.add_argument("--minutes", type=float, default=0.0, help="after which no batch is begun; 0 for no limit")
    parser.add_argument("--seed", type=int, default=20261130)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=2500)
    parser.add_argument("--out", type=Path, help="JSON; a table goes beside it")
    parser.add_argument("--part", type=int, nargs=3, metavar=("SEED", "FIRST", "COUNT"), help="in this process")
    args = parser.parse_args()
    if args.part:
        print(json.dumps(part(*args.part)))
        return 0
    found: dict[str, Any] = {"seed": args.seed, "next": 0, "inputs": 0, "outcomes": {}, "failures": [], "parts": []}
    found |= {"slowest_s": 0.0, "largest_mib_beyond_the_input": 0.0}
    if args.out and args.out.exists():
        found |= json.loads(args.out.read_text())
    if found["seed"] != args.seed:
        parser.error(f"{args.out} is of the seed {found['seed']}")
    go_on(found, args)
    print(table(found))
    for failure in found["failures"][:20]:
        print(failure)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
