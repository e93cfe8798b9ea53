"""Run a training script, and record its memory by phase: allocated, reserved and process on a GPU, resident on a CPU.

    memopt measure --out row.json -- python train.py --epochs 1

The script runs in this process, unchanged. `memopt estimate MODEL ... --against row.json` lays an estimate beside it.
The exit code is the script's; after Ctrl-C, too, what was measured is written.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import sys
import traceback
from argparse import REMAINDER, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from memopt.cli.output import files, terminal

SUMMARY = "run a training script, and record its memory by phase"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", default="measured.json", help="where the row goes (measured.json)")
    parser.add_argument("command", nargs=REMAINDER, metavar="-- python SCRIPT ...", help="what is run")


def run(args: Namespace) -> int:
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if words and os.path.basename(words[0]).startswith("python"):
        words = words[1:]
    module = words[:1] == ["-m"]
    target = words[module : module + 1]
    if target and target[0].endswith(".py") and not module and not os.path.exists(target[0]):
        raise ValueError(f"{target[0]!r} does not exist")
    if not target or (target[0].startswith("-")) or (not module and not os.path.isfile(target[0])):
        raise ValueError(
            "what is measured is a Python script or module, run in this process: "
            "memopt measure -- python train.py, or memopt measure -- python -m package.train"
        )
    if not module and b"\0" in Path(target[0]).read_bytes():
        raise ValueError(f"{target[0]!r} is a binary file and not a Python script")
    files.check("--out", args.out)
    from memopt.diagnosis.measured import measure

    code = 0
    before = sys.argv, list(sys.path)
    m = measure(shlex.join(["python", *words]))
    try:
        with m:
            sys.argv = [target[0], *words[module + 1 :]]
            sys.path[0:0] = ["" if module else os.path.dirname(os.path.abspath(target[0]))]
            if module:
                runpy.run_module(target[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target[0], run_name="__main__")
    except KeyboardInterrupt:  # what was measured until then is written
        code = 130
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:  # the script's own: its trace is what its author wants to see
        traceback.print_exc()
        code = 1
    finally:
        sys.argv, sys.path[:] = before[0], before[1]
    with open(args.out, "w") as file:
        file.write(json.dumps(m.row) + "\n")
    print(terminal.folded([*table(m.row), ""]))
    files.written(args.out)
    return code


def table(row: dict[str, Any]) -> list[str]:
    """The phases and the figures that there are."""
    from estimators.units import gib

    names = [n for n in ("allocated", "reserved", "process") if row["peak"][n] is not None]
    where = f"{row['name']}, torch {row['torch']}, {row['steps']} steps"
    if row["device"] == "cpu":
        where += f"; process: resident memory, {gib(row['base_nbytes'])} of it from before"
    lines = [where, "", "  ".join([f"{'phase':<8}", *(f"{n:>11}" for n in names)])]
    for phase, found in [*row["phases"].items(), ("peak", row["peak"])]:
        lines.append("  ".join([f"{phase:<8}", *(f"{gib(found[n]):>11}" for n in names)]))
    return lines
