"""What a model and its optimizer state will cost, before anything is allocated.

MODEL is a parameter count (8B, 350M), a built-in architecture (llama-3.1-8b; --models lists them), a Hugging Face
config.json, a folder that holds one, or safetensors files. Activations are counted with --seq. The exit code is 0 if
some spec fits the GPU (or none was given), 1 if none does, 2 if the input cannot be used.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from memopt.cli import hyper, placing

SUMMARY = "what a model and its optimizer state will cost, before anything is allocated"

#: What is compared when no spec is asked for; the second list is added when there are several ranks.
DEFAULT_SPECS = ("adamw", "adamw@paged", "adamw-8bit", "adamw-4bit", "adafactor")
SHARDED_SPECS = ("adamw/zero1", "adamw-8bit/zero1", "adamw/zero3", "adamw-8bit/zero3")
#: What DeepSpeed can run: rules that do not need a parameter's shape.
DEEPSPEED_SPECS = ("adamw/zero1", "adamw/zero2", "adamw-8bit/zero2", "adamw/zero3", "adamw-8bit/zero3")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a count, an architecture, a config.json or a folder")
    parser.add_argument("--optim", metavar="SPEC", nargs="+", action="extend", help="specs to compare (memopt list)")
    parser.add_argument("--gpu", metavar="SIZE|NAME", help="memory of one card: 24GiB, or a name such as rtx-4090")
    parser.add_argument("--world", metavar="N", default="1", help="data-parallel ranks (default 1)")
    parser.add_argument("--weights", metavar="DTYPE", help="bf16 (default), fp32 or fp16")
    parser.add_argument("--gradients", metavar="DTYPE", help="by default as the weights")
    parser.add_argument("--seq", metavar="N", help="tokens of each sequence: activations are counted")
    parser.add_argument("--batch", metavar="N", help="sequences of a micro-batch (default 1)")
    parser.add_argument("--accumulate", metavar="N", help="micro-batches per step (default 1)")
    parser.add_argument(
        "--checkpointing",
        metavar="HOW",
        help="none (default), full, selective (products are kept) or every-K (layers: every-2 is half of them)",
    )
    parser.add_argument("--attention", metavar="KIND", help="sdpa (default), flash or eager")
    parser.add_argument("--lora", metavar="RANK", help="adapters on all linear layers, the weights frozen")
    parser.add_argument("--quantised", metavar="KIND", help="storage of adapted weights: nf4 or nf4-double (QLoRA)")
    parser.add_argument(
        "--release-gradients",
        action="store_true",
        default=None,
        help="each parameter steps in the backward pass and frees its gradient",
    )
    parser.add_argument("--mixed", metavar="DTYPE", help="bf16 or fp16: computed in it, weights and gradients in fp32")
    parser.add_argument(
        "--deepspeed",
        action="store_true",
        default=None,
        help="DeepSpeed runs the step; the spec's /zero1, /zero2 or /zero3 is its stage",
    )
    parser.add_argument("--bucket", metavar="N", help="elements of DeepSpeed's reduce bucket (default 500000000)")
    hyper.add_arguments(parser)
    placing.add_arguments(parser)
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="options from what --emit wrote, a ds_config.json or accelerate's YAML",
    )
    parser.add_argument(
        "--emit", metavar="KIND", help="print a configuration: accelerate, deepspeed, transformers or python"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page that needs nothing else")
    parser.add_argument("--plot", metavar="FILE", help="write a picture (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the documented JSON instead of a table")
    parser.add_argument("--models", action="store_true", help="list the built-in architectures and stop")


def run(args: Namespace) -> int:
    if args.models:
        return _list_models(args)
    from estimators.costs import estimate
    from estimators.fields import InputError
    from estimators.report import as_text

    if args.source:
        from memopt.cli.launched import read_into

        read_into(args, args.source)
    if args.model is None:
        raise InputError(
            "which model? a parameter count such as 8B, an architecture (--models lists them), a "
            "config.json or a folder"
        )
    if args.json and args.emit:
        raise InputError("--json and --emit both print; one of them")
    world = whole(args.world, "--world")
    if args.emit == "deepspeed":
        args.deepspeed = True
    defaults = DEEPSPEED_SPECS if args.deepspeed else (*DEFAULT_SPECS, *(SHARDED_SPECS if world > 1 else ()))
    options = placing.told(args)
    if options and args.deepspeed:
        raise InputError(f"{placing.flag(min(options))} does not go with DeepSpeed, which offloads by its own settings")
    result = estimate(
        args.model,
        placing.placed(hyper.with_hyper(args.optim or defaults, hyper.given(args.hyper)), options),
        gpu=args.gpu,
        weights=args.weights,
        gradients=args.gradients,
        world_size=world,
        **step_options(args),
    )
    if args.html or args.plot:
        from estimators import pictures

        if args.html:
            pictures.write_html(result, args.html)
        if args.plot:
            pictures.write_plot(result, args.plot)
    if args.emit:
        from memopt.cli.emit import emit

        print(emit(args.emit, result), end="")
    elif args.json:
        import json

        print(json.dumps(result.to_json(), indent=2))
    else:
        print(as_text(result, colour=wants_colour(), bars=sys.stdout.isatty()))
    return 1 if result.fits is False else 0


def step_options(args: Namespace) -> dict[str, Any]:
    """How a step is trained, from the flags that were given."""
    options: dict[str, Any] = {}
    for name in ("seq", "batch", "accumulate", "lora", "bucket"):
        text = getattr(args, name)
        if text is not None:
            options[name] = whole(text, f"--{name}")
    for name in ("checkpointing", "attention", "quantised", "release_gradients", "deepspeed", "mixed"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    return options


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
