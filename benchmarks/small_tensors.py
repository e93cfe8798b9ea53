"""The command line of the benchmarks of many small tensors: fresh processes that measure, one that writes the table."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provenance import write_result

RESULTS = Path(__file__).parent / "results"


def main(
    file: str,
    about: str,
    processes: int,
    worker: Callable[[int, int, int], dict[str, Any]],
    rows_of: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    table: Callable[[list[dict[str, Any]], Namespace], str],
    **more: Any,
) -> None:
    """``worker(count, numel, threads)`` runs in each of ``processes`` of the program ``file``; ``rows_of`` what they
    have found is written with ``more`` to its .json, and ``table`` of it to its .md."""
    parser = ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--numel", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=processes)
    parser.add_argument("--print", action="store_true", help="print the table and write nothing")
    parser.add_argument("--worker", action="store_true", help="used by itself")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.count, args.numel, args.threads)))
        return
    command = [sys.executable, file, "--worker", "--count", str(args.count), "--numel", str(args.numel)]
    command += ["--threads", str(args.threads)]
    runs = []
    for _ in range(args.processes):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        runs.append(json.loads(done.stdout))
    rows = rows_of(runs)
    if not args.print:
        result = {"count": args.count, "numel": args.numel, "threads": args.threads, "rows": rows}
        write_result(RESULTS / f"{Path(file).stem}.json", {**result, **more})
        (RESULTS / f"{Path(file).stem}.md").write_text(table(rows, args))
    print(table(rows, args))
