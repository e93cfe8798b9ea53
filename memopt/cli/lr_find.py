"""Smith's range test: the rate rises from step to step, and the loss says where it is too high. On the small language
model of `memopt train` and your text; for your own model there is memopt.diagnosis.range_test.

    memopt lr-find notes/ --optim adamw-8bit --plot rates.png
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from memopt.cli.flags import hyperparameters
from memopt.cli.output import files, terminal

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.diagnosis import RangeTest


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("path", nargs="?", metavar="PATH", help="text file or folder; without it, Python's language reference")
    add("--optim", default="adamw", metavar="SPEC", help="default adamw")
    hyperparameters.add_arguments(parser)
    add("--from", type=float, default=1e-5, dest="lowest", metavar="RATE", help="first rate, default %(default)s")
    add("--to", type=float, default=1.0, dest="highest", metavar="RATE", help="last rate, default %(default)s")
    add("--steps", type=int, default=100, metavar="N", help="default %(default)s")
    add("--batch", type=int, default=16, metavar="N", help="windows in one step, default %(default)s")
    add("--context", type=int, default=128, metavar="N", help="bytes in one window, default %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of weights and batches, default 0")
    add("--plot", metavar="FILE", help="also write a picture, .png, .svg or .pdf (needs matplotlib)")
    add("--json", action="store_true", help="print rates and losses as JSON")


def run(args: Namespace) -> int:
    from memopt.spec import parse
    from memopt.train.job import Job, ModelConfig
    from memopt.train.text import load_text

    files.check("--plot", args.plot, picture=True)
    # A job checks the numbers before torch is loaded.
    (spec,) = hyperparameters.with_hyper([parse(args.optim)], hyperparameters.given(args.hyper))
    job = Job(
        spec=str(spec),
        hyper=dict(spec.hyper),
        lr=1.0,
        path=args.path,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        model=ModelConfig(context=args.context),
    )
    text = load_text(args.path)
    text.check(args.context)
    import torch

    import memopt
    from memopt.cli.output.progress import progress
    from memopt.diagnosis import range_test
    from memopt.train.model import LanguageModel
    from memopt.train.text import Corpus

    torch.manual_seed(job.seed)
    model, corpus = LanguageModel(job.model), Corpus(text, args.context)
    optimizer = memopt.create(model, spec, lr=args.lowest)
    with progress("steps", args.steps) as advance:

        def loss_of(step: int) -> Tensor:
            advance(1)
            loss: Tensor = model(corpus.batch(job.seed, step, job.batch))
            return loss

        result = range_test(optimizer, loss_of, lowest=args.lowest, highest=args.highest, steps=args.steps)
    if args.plot:
        _plot(args.plot, result, args.optim)
        files.written(args.plot, quiet_stdout=args.json)
    if args.json:
        print(json.dumps(_record(result, args.optim)))
        return 0
    from memopt.cli.output import charts

    print(f"{args.optim} on {text.name}: smoothed loss against the rate")
    curve = charts.terminal(
        result.rates, result.smoothed, width=charts.width(), log_x=True, x_label="rate", y_label="loss"
    )
    print("\n".join(curve))
    end = (
        f"It diverged at {result.rates[-1]:.1e}." if result.diverged else f"It did not diverge up to {args.highest:g}."
    )
    said = f"The loss fell fastest at {result.steepest:.1e} and was lowest at {result.lowest:.1e}. {end}"
    print(terminal.folded([said], hanging=0))
    print(f"A peak rate to begin with: {result.suggestion:.1e}")
    return 0


def _plot(path: str, result: RangeTest, spec: str) -> None:
    from memopt.cli.output.charts import save_png

    best = min(result.smoothed)
    shown = [min(x, 2 * best) for x in result.losses]  # one exploding loss would flatten the curve
    marks = {"fastest": result.steepest, "lowest": result.lowest, "suggestion": result.suggestion}
    save_png(
        path,
        result.rates,
        {"smoothed": [min(x, 2 * best) for x in result.smoothed], "loss": shown},
        log_x=True,
        title=f"range test, {spec}",
        x_label="rate",
        y_label="loss",
        marks=marks,
    )


def _record(result: RangeTest, spec: str) -> dict[str, object]:
    numbers = {
        name: [x if x < float("inf") else None for x in getattr(result, name)] for name in ("losses", "smoothed")
    }
    return {
        "schema": "memopt.lr-find/1",
        "spec": spec,
        "rates": list(result.rates),
        **numbers,
        "steepest": result.steepest,
        "lowest": result.lowest,
        "diverged": result.diverged,
        "suggestion": result.suggestion,
    }
