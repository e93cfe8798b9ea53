"""What a model and its optimizer state will cost, before anything is allocated.

MODEL is a parameter count (8B, 350M), a built-in architecture (llama-3.1-8b; --models lists them), a Hugging Face
config.json, a folder that holds one, safetensors files, or the folder of a PEFT adapter. Activations are counted with
--seq, and without them there is no verdict. The exit code is 0 if some spec FITS the GPU at most (or no GPU was given),
1 if none does or that is not known, 2 if the input cannot be used.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from estimators.result import Estimate

from memopt.cli.flags import hyperparameters, placement, step
from memopt.cli.output import files, progress, terminal

SUMMARY = "what a model and its optimizer state will cost, before anything is allocated"

#: What is compared when no spec is asked for; the second list is added when there are several ranks.
DEFAULT_SPECS = ("adamw", "adamw@paged", "adamw-8bit", "adamw-4bit", "adafactor")
SHARDED_SPECS = ("adamw/zero1", "adamw-8bit/zero1", "adamw/zero3", "adamw-8bit/zero3")
#: What DeepSpeed can run: rules that do not need a parameter's shape.
DEEPSPEED_SPECS = ("adamw/zero1", "adamw/zero2", "adamw-8bit/zero2", "adamw/zero3", "adamw-8bit/zero3")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a count, an architecture, a config.json or a folder")
    parser.add_argument(
        "--module", metavar="PACKAGE.MODULE:NAME", help="in place of MODEL: a torch.nn.Module, or what makes one"
    )
    parser.add_argument(
        "--inputs", metavar="PACKAGE.MODULE:NAME", help="of one micro-batch of --module, or what makes them"
    )
    parser.add_argument("--optim", metavar="SPEC", nargs="+", action="extend", help="specs to compare (memopt list)")
    parser.add_argument("--gpu", metavar="SIZE|NAME", help="memory of one card: 24GiB, or a name such as rtx-4090")
    parser.add_argument("--world", metavar="N", default="1", help="data-parallel ranks (default 1)")
    parser.add_argument("--weights", metavar="DTYPE", help="bf16 (default), fp32 or fp16")
    parser.add_argument("--gradients", metavar="DTYPE", help="by default as the weights")
    step.add_arguments(parser)
    hyperparameters.add_arguments(parser)
    placement.add_arguments(parser)
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
    parser.add_argument("--against", metavar="FILE", help="lay the estimate beside a row of memopt measure")
    parser.add_argument("--json", action="store_true", help="print the documented JSON instead of a table")
    parser.add_argument(
        "--accept-tight", action="store_true", help="exit code 0 where only the expected figure fits, too"
    )
    parser.add_argument("--models", action="store_true", help="list the built-in architectures and stop")


def run(args: Namespace) -> int:
    if args.models:
        return _list_models(args)
    files.check("--html", args.html)
    files.check("--plot", args.plot, picture=True)
    from estimators.errors import InputError
    from estimators.report.text import as_text

    if args.source:
        from memopt.cli.flags.launched import read_into

        read_into(args, args.source)
    if args.module and args.model is not None:
        raise InputError(f"--module is in place of a model, and the model {args.model!r} is given; one of them")
    if args.inputs and not args.module:
        raise InputError("--inputs are those of --module, which is not given")
    if args.model is None and not args.module:
        raise InputError(
            "which model? a parameter count such as 8B, an architecture (--models lists them), a "
            "config.json or a folder"
        )
    if args.json and args.emit:
        raise InputError("--json and --emit both print; one of them")
    if args.against and (args.json or args.emit):
        raise InputError(
            f"--against is laid beside the table, which --{'json' if args.json else 'emit'} prints none of"
        )
    measured = None
    if args.against:
        from estimators.report import against

        measured = against.read(args.against)
    # What was measured on a CPU is laid beside a step there, without a card's context and masks; --gpu asks for a card.
    on_cpu = measured is not None and measured.get("device") == "cpu" and not args.gpu
    with progress.working("estimating"):
        result = estimated(args, "cpu" if on_cpu else "cuda")
    if args.html or args.plot:
        from estimators.report import pictures

        if args.html:
            pictures.write_html(result, args.html)
            files.written(args.html, quiet_stdout=bool(args.json or args.emit))
        if args.plot:
            pictures.write_plot(result, args.plot)
            files.written(args.plot, quiet_stdout=bool(args.json or args.emit))
    if args.emit:
        from memopt.cli.output.emit import emit

        print(emit(args.emit, result), end="")
    elif args.json:
        import json

        print(json.dumps(result.to_json(), indent=2))
    else:
        print(as_text(result, colour=wants_colour(), bars=sys.stdout.isatty(), width=terminal.columns()))
        if measured is not None:
            print("\n" + terminal.folded(against.compared(result, measured)))
    return 0 if result.gpu is None or good(result, args.accept_tight) else 1


def estimated(args: Namespace, device: str = "cuda") -> Estimate:
    """The estimate that the flags ask for, of a step on this device. ``args.model`` may also be what else
    :func:`estimators.estimate` takes."""
    from estimators.calculator import estimate
    from estimators.errors import InputError

    world = whole(args.world, "--world")
    if args.emit == "deepspeed":
        args.deepspeed = True
    defaults = DEEPSPEED_SPECS if args.deepspeed else (*DEFAULT_SPECS, *(SHARDED_SPECS if world > 1 else ()))
    options = placement.told(args)
    if options and args.deepspeed:
        raise InputError(
            f"{placement.flag(min(options))} does not go with DeepSpeed, which offloads by its own settings"
        )
    model, inputs = args.model, None
    if args.module:
        from estimators.traced.given import module_and_inputs

        model, inputs = module_and_inputs(args.module, args.inputs)
    return estimate(
        model,
        placement.placed(
            hyperparameters.with_hyper(args.optim or defaults, hyperparameters.given(args.hyper)), options
        ),
        gpu=args.gpu,
        weights=args.weights,
        gradients=args.gradients,
        world_size=world,
        inputs=inputs,
        device=device,
        **step_options(args),
    )


def good(result: Estimate, accept_tight: bool | None) -> bool:
    """Whether some spec has a verdict that is good enough."""
    wanted = ("FITS", "TIGHT") if accept_tight else ("FITS",)
    return any(result.verdict(column) in wanted for column in result.columns)


step_options = step.given
whole = step.whole


def wants_colour() -> bool:
    """On a terminal that has colours, unless NO_COLOR asks for none (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def _list_models(args: Namespace) -> int:
    from estimators.errors import InputError
    from estimators.models.resolve import architectures

    if args.model is not None:
        raise InputError(f"--models lists the architectures; it does not go with the model {args.model!r}")
    if args.json:
        import json

        print(json.dumps(list(architectures())))
    else:
        print("\n".join(architectures()))
    return 0
