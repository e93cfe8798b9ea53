"""What a model and its optimizer state will cost, before anything is allocated.

MODEL is a parameter count (8B, 350M), a built-in architecture (llama-3.1-8b; --models lists them), a Hugging Face
config.json, a folder that holds one, or safetensors files. The exit code is 0 if some spec fits the GPU (or none was
given), 1 if none does, 2 if the input cannot be used.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace

SUMMARY = "what a model and its optimizer state will cost, before anything is allocated"

#: What is compared when no spec is asked for; the second list is added when there are several ranks.
DEFAULT_SPECS = ("adamw", "adamw@paged", "adamw-8bit", "adamw-4bit", "adafactor")
SHARDED_SPECS = ("adamw/zero1", "adamw-8bit/zero1")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a count, an architecture, a config.json or a folder")
    parser.add_argument("--optim", metavar="SPEC", nargs="+", action="extend", help="specs to compare (memopt list)")
    parser.add_argument("--gpu", metavar="SIZE|NAME", help="memory of one card: 24GiB, or a name such as rtx-4090")
    parser.add_argument("--world", metavar="N", default="1", help="data-parallel ranks (default 1)")
    parser.add_argument("--weights", metavar="DTYPE", help="bf16 (default), fp32 or fp16")
    parser.add_argument("--gradients", metavar="DTYPE", help="by default as the weights")
    parser.add_argument("--json", action="store_true", help="print the documented JSON instead of a table")
    parser.add_argument("--models", action="store_true", help="list the built-in architectures and stop")


def run(args: Namespace) -> int:
    if args.models:
        return _list_models(args)
    from estimators.costs import estimate
    from estimators.fields import InputError
    from estimators.report import as_text

    if args.model is None:
        raise InputError("which model? a parameter count such as 8B, an architecture (--models lists them), a "
                         "config.json or a folder")  # fmt: skip
    world = whole(args.world, "--world")
    result = estimate(
        args.model,
        args.optim or [*DEFAULT_SPECS, *(SHARDED_SPECS if world > 1 else ())],
        gpu=args.gpu,
        weights=args.weights,
        gradients=args.gradients,
        world_size=world,
    )
    if args.json:
        import json

        print(json.dumps(result.to_json(), indent=2))
    else:
        print(as_text(result, colour=wants_colour()))
    return 1 if result.fits is False else 0


def whole(text: str, what: str) -> int:
    """A whole number from the command line."""
    from estimators.fields import InputError, shown

    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise InputError(f"{what} {shown(text)} is not allowed; it is a whole number >= 1")
    return int(text)


def wants_colour() -> bool:
    """On a terminal that has colours, unless NO_COLOR asks for none (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def _list_models(args: Namespace) -> int:
    from estimators.fields import InputError
    from estimators.model import architectures

    if args.model is not None:
        raise InputError(f"--models lists the architectures; it does not go with the model {args.model!r}")
    if args.json:
        import json

        print(json.dumps(list(architectures())))
    else:
        print("\n".join(architectures()))
    return 0
