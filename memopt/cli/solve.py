"""The inverse of an estimate: the largest batch, sequence, LoRA rank or model that fits a card with your settings, or
the fewest GPUs or the smallest card for them.

    memopt solve llama-3.1-8b --gpu 24GiB --largest seq --lora 16 --checkpointing full
    memopt solve llama-3.1-8b --gpu h100 --smallest gpus --optim adamw-8bit/zero3 --seq 4096

Every flag of memopt estimate is held. The answer fits by what is needed at most; the next value does not, and it
is said by how much. The exit code is 0 if there is an answer, 1 if nothing fits, 2 if the input cannot be used.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from estimators.report.lines import WIDTH, wrap
from memopt.cli.flags import hyperparameters, placement, step
from memopt.cli.output import progress, terminal

if TYPE_CHECKING:
    from estimators.planning.solve import Solved

SUMMARY = "the largest batch, sequence, rank or model that fits a card, or the fewest GPUs"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an architecture, a config.json or a folder")
    parser.add_argument("--gpu", metavar="SIZE|NAME", default="", help="24GiB, or a name such as rtx-4090")
    parser.add_argument(
        "--largest", metavar="WHAT", default="", help="batch, seq, lora, parameters (by layers) or layers-trained"
    )
    parser.add_argument("--smallest", metavar="WHAT", default="", help="gpus, or gpu: which of the known cards")
    parser.add_argument("--optim", metavar="SPEC", default="adamw", help="one spec (default adamw; memopt list)")
    parser.add_argument("--world", metavar="N", default="1", help="data-parallel ranks (default 1)")
    parser.add_argument("--weights", metavar="DTYPE", help="bf16 (default), fp32 or fp16")
    parser.add_argument("--gradients", metavar="DTYPE", help="by default as the weights")
    step.add_arguments(parser)
    hyperparameters.add_arguments(parser)
    placement.add_arguments(parser)
    parser.add_argument("--accept-tight", action="store_true", help="it is enough that the expected figure fits")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: Namespace) -> int:
    from estimators.planning.solve import solve

    options = step.given(args)
    world = step.whole(args.world, "--world")
    (spec,) = placement.placed(
        hyperparameters.with_hyper([args.optim], hyperparameters.given(args.hyper)), placement.told(args)
    )
    with progress.working("searching"):
        found = solve(
            args.model,
            args.gpu,
            largest=args.largest,
            smallest=args.smallest,
            optim=spec,
            accept_tight=args.accept_tight,
            **({"world_size": world} if args.smallest != "gpus" else {}),
            **{name: value for name in ("weights", "gradients") if (value := getattr(args, name))},
            **options,
        )
    if args.json:
        import json

        print(json.dumps(as_json(found), indent=2))
    else:
        print("\n".join(as_lines(found, terminal.columns())))
    return 0 if found.value is not None else 1


def as_json(found: Solved) -> dict[str, object]:
    """Schema ``memopt.solve/1``: bytes are integers."""
    e, column = found.estimate, found.estimate.columns[0]
    return {
        "schema": "memopt.solve/1",
        "model": e.model.name,
        "gpu_nbytes": e.gpu or found.gpu,
        "what": found.what,
        "value": found.value,
        "spec": column.spec,
        "training": e.training._asdict(),
        "world_size": e.world_size,
        "accept_tight": found.accept_tight,
        "process": column.process._asdict(),
        "next": None
        if found.beyond is None
        else {
            "value": found.beyond_value,
            "over_nbytes": found.over,
            "process": found.beyond.columns[0].process._asdict(),
        },
        "end": found.end,
    }


#: What was looked for -> how its value reads.
_READS = {
    "batch": "micro-batches of up to {}",
    "seq": "sequences of up to {} tokens",
    "lora": "adapters of rank up to {}",
    "parameters": "up to {} parameters, by the number of layers",
    "layers-trained": "the last {} layers trained",
    "gpus": "at least {} GPU(s)",
    "gpu": "{} is the smallest card",
}


def as_lines(found: Solved, width: int = WIDTH) -> list[str]:
    from estimators.parallel.degrees import cards
    from estimators.planning.solve import needed
    from estimators.training import describe_training
    from estimators.units import gib

    e, column = found.estimate, found.estimate.columns[0]
    card = f" on {gib(found.gpu)}" if found.what != "gpu" else ""
    gpus = cards(e.training, e.world_size)
    ranks = f", {gpus:,} GPUs" if gpus > 1 else ""
    lines = wrap(f"{e.model.name}{card}{ranks}, {column.spec}: {describe_training(e.training)}", width)
    figure = "expected" if found.accept_tight else "at most"

    if found.value is None:
        over = gib(needed(e, found.accept_tight) - found.gpu)
        few = f" Even {found.end}." if found.what == "gpu" else ""
        return [*lines, "", *wrap(f"Nothing fits: it is over by {over}, {figure}.{few}", width)]
    process = f"{gib(column.process.expected)}, at most {gib(column.process.high)}"
    value, next_ = (f"{v:,}" if isinstance(v, int) else str(v) for v in (found.value, found.beyond_value))
    said = _READS[found.what].format(value)
    lines += ["", *wrap(f"{said[0].upper() if found.what != 'gpu' else said[0]}{said[1:]}: {process}.", width)]
    if found.beyond is not None:
        card = f" of {gib(found.gpu)}" if found.what == "gpu" else ""
        lines += wrap(f"{next_}{card} would be over by {gib(found.over)}, {figure}.", width)
    elif found.end:
        lines += wrap(f"That is not the card's limit: {found.end}.", width)
    return lines
