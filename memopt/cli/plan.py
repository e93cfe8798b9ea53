"""The configurations of a model that fit a card, the gentlest first, each with one sentence of why.

The search is over optimizer, sharding (with --gpus), checkpointing, micro-batch x accumulation and adapters. The exit
code is 0 if something fits, 1 if nothing does, 2 if the input cannot be used.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from estimators.plan import Plans

SUMMARY = "the configurations that fit a card, the gentlest first"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an architecture, a config.json or a folder")
    parser.add_argument("--gpu", metavar="SIZE|NAME", required=True, help="24GiB, or a name such as rtx-4090")
    parser.add_argument("--seq", metavar="N", help="tokens of each sequence (default 2048, or the model's positions)")
    parser.add_argument("--batch", metavar="N", default="8", help="sequences per step and card (default 8)")
    parser.add_argument(
        "--gpus", metavar="N", default="1", help="cards of that size (default 1): sharding is tried too"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: Namespace) -> int:
    from estimators.plan import plans
    from memopt.cli.estimate import whole

    result = plans(
        args.model,
        args.gpu,
        seq=whole(args.seq, "--seq") if args.seq else 0,
        batch=whole(args.batch, "--batch"),
        gpus=whole(args.gpus, "--gpus"),
    )
    if args.json:
        import json

        print(json.dumps(as_json(result), indent=2))
    else:
        print("\n".join(as_lines(result)))
    return 0 if result.found else 1


def as_json(result: Plans) -> dict[str, object]:
    """Schema ``memopt.plan/1``: bytes are integers."""
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
                "peak_nbytes": p.estimate.peak.nbytes,
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


def as_lines(result: Plans) -> list[str]:
    from estimators.plan import title
    from estimators.report import wrap
    from estimators.units import gib

    cards, each = (f"{result.gpus} x ", " and card") if result.gpus > 1 else ("", "")
    title_ = f"{result.model.name} on {cards}{gib(result.gpu)}, {result.batch} x {result.seq:,} tokens per step{each}"
    lines = [title_, ""]
    for number, plan in enumerate(result.found, 1):
        lines.append(f"{number}. {title(plan)}: {gib(plan.estimate.peak.nbytes)}")
        lines += [f"   {line}" for line in wrap(f"{plan.why}.", 77)]
    if not result.found:
        lines.append("Nothing fits, not even adapters on 4-bit weights.")
    else:
        lines += [
            "",
            f"With 1: micro-batches of up to {result.largest_batch:,} at this length; up to about "
            f"{result.longest_seq:,} tokens in a micro-batch of 1.",
        ]
    for spec, what, ranks in (
        ("adamw/zero1", "its state sharded", result.ranks),
        ("adamw/zero3", "everything sharded", result.ranks_zero3),
    ):
        count = "on no number of GPUs up to 1,024" if ranks is None else f"on {ranks:,} GPU(s)"
        lines += wrap(f"32-bit AdamW with {what} ({spec}) fits {count} like this one.")
    lines += wrap(f"8 GiB more would buy: {result.more}.")
    return lines
