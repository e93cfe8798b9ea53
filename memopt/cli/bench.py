"""Time one optimizer step on this CPU: memopt's rules and formats against the libraries that are installed.

    memopt bench                        a table at 16.8 M parameters, and step_cpu.json and step_cpu.md in this folder
    memopt bench --numel 1000000 --small --scaling

All candidates are interleaved in one process and medians are compared. Takes some minutes.
"""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType

from memopt.cli.output import files

SUMMARY = "time one optimizer step on this CPU against torch and the other libraries"

#: The largest number of a flag.
MOST = 2**32
#: The benchmark lives beside the package in a checkout.
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_cpu.py"


def _script() -> ModuleType:
    if not SCRIPT.exists():
        raise RuntimeError("the benchmark is part of the repository and not of the package; run it in a checkout")
    if str(SCRIPT.parent) not in sys.path:
        sys.path.append(str(SCRIPT.parent))
    return importlib.import_module(SCRIPT.stem)


def add_arguments(parser: ArgumentParser) -> None:
    _script().add_arguments(parser)
    parser.set_defaults(out=Path())


def run(args: Namespace) -> int:
    for name, least in (("numel", 1), ("rounds", 1), ("processes", 1), ("threads", 1), ("largest", 1024)):
        if not least <= getattr(args, name) <= MOST:
            raise ValueError(
                f"--{name} {getattr(args, name)} is not allowed; it is a whole number from {least} to {MOST}"
            )
    files.check_folder("--out", args.out)
    results = [str(args.out / f"{SCRIPT.stem}.{kind}") for kind in ("json", "md")]
    args.out.mkdir(parents=True, exist_ok=True)
    for path in results:
        files.check("--out", path)
    code = int(_script().run(args))
    for path in results:
        files.written(path)
    return code
