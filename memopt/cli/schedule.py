"""The learning rate that a schedule gives at every step: in the terminal, as a picture, as JSON.

memopt schedule cosine --total-steps 1000 --warmup 0.02 --floor 0.1 --lr 3e-4 --plot rate.png
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from memopt.cli.output import files, terminal
from memopt.training.schedules import KINDS, Factor, make_factor
from memopt.untrusted.text import shown

#: Keyword of a kind -> type on the command line.
EXTRAS: dict[str, Callable[[str], float]] = {
    "cycle": int,
    "cycle_mult": int,
    "timescale": int,
    "hold": int,
    "every": int,
    "gamma": float,
    "decay": float,
}
#: Steps that are shown of a schedule that has no end.
DEFAULT_STEPS = 1000
#: Points of a curve; the last step is always one of them.
POINTS = 4096
#: Whole numbers of the command line end here, and JSON, which has every step's rate, earlier.
MOST = 10**12
MOST_JSON = 10**6


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("kind", metavar="KIND", help=f"{', '.join(KINDS)}")
    add("--warmup", metavar="N|SHARE", default="0", help="steps, or with a point a share of all steps (default 0)")
    add("--total-steps", type=int, metavar="N", help="steps of the run; kinds that end need it")
    add("--floor", type=float, default=0.0, metavar="SHARE", help="lowest rate as a share of the peak (default 0)")
    add("--lr", type=float, default=1.0, metavar="RATE", help="the peak (default 1)")
    for name, kind in EXTRAS.items():
        owner = next(k for k, (_, extra) in KINDS.items() if name in extra)
        add(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=f"of {owner}")
    add("--plot", metavar="FILE", help="also write a picture, .png, .svg or .pdf (needs matplotlib)")
    add("--json", action="store_true", help="print every step's rate as JSON")


def run(args: Namespace) -> int:
    files.check("--plot", args.plot, picture=True)
    factor, steps = build(args)
    if args.json and steps > MOST_JSON:
        raise ValueError(f"--json prints a rate for each of {steps:,} steps; it prints at most {MOST_JSON:,}")
    at = range(steps) if args.json else sorted({*range(0, steps, max(steps // POINTS, 1)), steps - 1})
    rates = [args.lr * factor(t) for t in at]
    if args.plot:
        from memopt.cli.output.charts import save_png

        save_png(args.plot, at, {"rate": rates}, title=describe_schedule(factor), x_label="step", y_label="rate")
        files.written(args.plot, quiet_stdout=args.json)
    if args.json:
        numbers = {"warmup": factor.warmup, "total_steps": factor.total_steps, "floor": factor.floor, **factor.extra}
        print(json.dumps({"schema": "memopt.schedule/1", "kind": factor.kind, **numbers, "lr": rates}))
        return 0
    from memopt.cli.output import charts

    print(terminal.folded([describe_schedule(factor)]))
    print("\n".join(charts.terminal(at, rates, width=charts.width(), x_label="step", y_label="rate")))
    marks = {0, factor.warmup, steps // 4, steps // 2, 3 * steps // 4, steps - 1}
    steps_shown = sorted(t for t in marks if 0 <= t < steps)
    print(terminal.folded(["  ".join(f"{t}: {args.lr * factor(t):.4g}" for t in steps_shown)], hanging=0))
    return 0


def build(args: Namespace) -> tuple[Factor, int]:
    """The factor, and how many of its steps to show."""
    extra = {name: getattr(args, name) for name in EXTRAS if getattr(args, name) is not None}
    for name, value in (("total_steps", args.total_steps), *extra.items()):
        if isinstance(value, int) and value > MOST:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {shown(value)} is not allowed; it is a whole number up to {MOST:,}")
    try:
        warmup: int | float = int(args.warmup) if args.warmup.isdecimal() else float(args.warmup)
    except ValueError:
        raise ValueError(f"--warmup {shown(args.warmup)} is not allowed; it is steps or a share") from None
    if isinstance(warmup, int) and warmup > MOST:
        raise ValueError(f"--warmup {shown(warmup)} is not allowed; it is a whole number up to {MOST:,}, or a share")
    factor = make_factor(args.kind, warmup=warmup, total_steps=args.total_steps, floor=args.floor, **extra)
    if not 0 <= args.lr < float("inf"):
        raise ValueError(f"--lr {args.lr} is not allowed; it is a finite number >= 0")
    return factor, args.total_steps or max(DEFAULT_STEPS, 10 * factor.warmup)


def describe_schedule(factor: Factor) -> str:
    warmup = f"{factor.warmup} steps of warm-up, then " if factor.warmup else ""
    extra = "".join(f", {name} {value}" for name, value in factor.extra.items() if value is not None)
    of = f" over {factor.total_steps} steps" if factor.total_steps else ""
    floor = f", floor {factor.floor:g}" if factor.floor else ""
    return f"{factor.kind}{of}: {warmup}{KINDS[factor.kind][0]}{floor}{extra}"
