"""The configurations of a model that fit a card, the gentlest first, each with one sentence of why.

The search is over optimizer, gradient release, offload, sharding (with --gpus), checkpointing, micro-batch x
accumulation and adapters; what a flag says is held. A plan fits by what it takes at most. The exit code is 0 if
something fits, 1 if nothing does, 2 if the input cannot be used.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from estimators.report.lines import WIDTH, wrap
from memopt.cli.flags import hyperparameters, placement, step
from memopt.cli.output import progress, terminal

if TYPE_CHECKING:
    from estimators.planning.plan import Plans

SUMMARY = "the configurations that fit a card, the gentlest first"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an architecture, a config.json or a folder")
    parser.add_argument("--gpu", metavar="SIZE|NAME", required=True, help="24GiB, or a name such as rtx-4090")
    parser.add_argument(
        "--gpus", metavar="N", default="1", help="cards of that size (default 1): sharding is tried too"
    )
    parser.add_argument("--optim", metavar="SPEC", nargs="+", action="extend", help="specs to try in place of ours")
    parser.add_argument("--weights", metavar="DTYPE", help="bf16 (default), fp32 or fp16")
    parser.add_argument("--gradients", metavar="DTYPE", help="by default as the weights")
    step.add_arguments(parser)
    parser.set_defaults(batch="8")  # sequences per step and card
    hyperparameters.add_arguments(parser)
    placement.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: Namespace) -> int:
    with progress.working("searching"):
        result = planned(args)
    if args.json:
        import json

        print(json.dumps(as_json(result), indent=2))
    else:
        print("\n".join(as_lines(result, terminal.columns())))
    return 0 if result.found else 1


def planned(args: Namespace) -> Plans:
    """The plans that the flags ask for. ``args.model`` may also be what else :func:`estimators.estimate` takes."""
    from estimators.planning.plan import plans

    options = step.given(args)
    specs = hyperparameters.with_hyper(args.optim or (), hyperparameters.given(args.hyper)) if args.optim else ()
    return plans(
        args.model,
        args.gpu,
        seq=options.pop("seq", 0),
        batch=options.pop("batch"),
        gpus=step.whole(args.gpus, "--gpus"),
        optim=specs,
        **{name: value for name in ("weights", "gradients") if (value := getattr(args, name))},
        **options,
        **placement.told(args),
    )


def as_json(result: Plans) -> dict[str, object]:
    """Schema ``memopt.plan/1``: bytes are integers."""
    from estimators.memory.memory_row import FIGURES

    return {
        "schema": "memopt.plan/1",
        "model": result.model.name,
        "gpu_nbytes": result.gpu,
        "seq": result.seq,
        "batch": result.batch,
        "plans": [
            {
                "spec": p.spec,
                "lora": p.method.lora,
                "quantised": p.method.quantised,
                "micro_batch": p.micro_batch,
                "accumulate": p.accumulate,
                "checkpointing": p.checkpointing,
                "release_gradients": p.method.release,
                "offload_gradients": p.method.offload_gradients,
                "peak_nbytes": p.estimate.peak.nbytes,
                "peak": {name: getattr(p.estimate.columns[0], name)._asdict() for name in FIGURES},
                "host_nbytes": p.estimate.peak.host,
                "why": p.why,
            }
            for p in result.found
        ],
        "largest_batch": result.largest_batch,
        "longest_seq": result.longest_seq,
        "gpus": result.gpus,
        "ranks": result.ranks,
        "ranks_zero3": result.ranks_zero3,
        "more": result.more,
    }


def as_lines(result: Plans, width: int = WIDTH) -> list[str]:
    from estimators.planning.plan import title
    from estimators.units import gib

    cards, each = (f"{result.gpus} x ", " and card") if result.gpus > 1 else ("", "")
    if result.data_parallel < result.gpus:
        each = f" and data-parallel rank ({result.data_parallel} of them)"
    title_ = f"{result.model.name} on {cards}{gib(result.gpu)}, {result.batch} x {result.seq:,} tokens per step{each}"
    lines = [*wrap(title_, width), ""]
    for number, plan in enumerate(result.found, 1):
        _, expected, high = plan.estimate.columns[0].process
        lines += wrap(f"{number}. {title(plan)}: {gib(expected)}, at most {gib(high)}", width, 3)
        lines += [f"   {line}" for line in wrap(f"{plan.why}.", width - 3)]
    if not result.found:
        lines.append("Nothing fits, not even adapters on 4-bit weights.")
    else:
        lines += [
            "",
            *wrap(
                f"With 1: micro-batches of up to {result.largest_batch:,} at this length; up to about "
                f"{result.longest_seq:,} tokens in a micro-batch of 1.",
                width,
            ),
        ]
    for spec, what, ranks in (
        ("adamw/zero1", "its state sharded", result.ranks),
        ("adamw/zero3", "everything sharded", result.ranks_zero3),
    ):
        count = "on no number of GPUs up to 1,024" if ranks is None else f"on {ranks:,} GPU(s)"
        lines += wrap(f"32-bit AdamW with {what} ({spec}) fits {count} like this one.", width)
    lines += wrap(f"8 GiB more would buy: {result.more}.", width)
    return lines
