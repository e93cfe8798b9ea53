"""Train a small language model on real text, once for each spec, and compare what the optimizer state cost.

Every run has processes of its own; specs with a partition (adamw/zero1) get several, whose gradients are averaged.
The command fails with exit code 1 when the state of any run is not, to the byte, what was predicted for it.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from memopt.cli.flags import hyperparameters
from memopt.cli.output import files, terminal
from memopt.core.hyperparameters import SpecError
from memopt.spec import OptimSpec, parse
from memopt.train.job import Job, ModelConfig, Result
from memopt.train.recipe import learning_rate
from memopt.train.text import Text, load_text

#: The five kinds: full precision, 8 bits, paged, factored, sharded.
KINDS = ("adamw", "adamw-8bit", "adamw@paged", "adafactor", "adamw/zero1")
#: Columns of the table where the output is not a terminal.
PIPED_WIDTH = 100


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("path", nargs="?", metavar="PATH", help="text file or folder; without it, Python's language reference")
    add("--optim", nargs="+", action="extend", metavar="SPEC", help=f"default: {' '.join(KINDS)}")
    hyperparameters.add_arguments(parser)
    add("--steps", type=int, default=200, metavar="N", help="steps of each run, default %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of weights, batches and rounding, default 0")
    add("--batch", type=int, default=16, metavar="N", help="windows in one step, default %(default)s")
    add("--context", type=int, default=128, metavar="N", help="bytes in one window, default %(default)s")
    add("--lr", type=float, metavar="RATE", help="peak learning rate, default one for each rule")
    add("--world", type=int, default=2, metavar="N", help="processes of a partitioned spec, default %(default)s")
    add("--threads", type=int, metavar="N", help="threads of a run, all processes together; default all cores")
    add(
        "--timeout",
        type=float,
        default=300,
        metavar="S",
        help="end a run in which no step ends for S seconds, default 300",
    )
    add("--json", metavar="FILE", help="also write the figures to FILE")


def run(args: Namespace) -> int:
    files.check("--json", args.json)  # a path that cannot be written is said before the training, not after it
    jobs = [_job(spec, args) for spec in _specs(args)]
    text = load_text(args.path)
    text.check(args.context)
    results, failures = _run_all(jobs, text)
    if args.json:
        Path(args.json).write_text(json.dumps(_record(text, results, failures), indent=2) + "\n")
        files.written(args.json)
    for failure in failures:
        print(f"memopt train: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _specs(args: Namespace) -> list[OptimSpec]:
    specs = []
    for text in args.optim or KINDS:
        try:
            specs.append(parse(text))
        except SpecError as error:
            hint = f" ({text!r} is a path: write it before --optim)" if os.path.exists(text) else ""
            raise SpecError(f"{error}{hint}") from None
    return hyperparameters.with_hyper(specs, hyperparameters.given(args.hyper))


def _job(spec: OptimSpec, args: Namespace) -> Job:
    return Job(
        spec=str(spec),
        lr=learning_rate(spec.rule) if args.lr is None else args.lr,
        path=args.path,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        threads=args.threads,
        world_size=args.world if spec.partition != "none" else 1,
        timeout=args.timeout,
        model=ModelConfig(context=args.context),
        hyper=dict(spec.hyper),
    )


def _run_all(jobs: Sequence[Job], text: Text) -> tuple[list[Result], list[str]]:
    """Every job in turn; a run that fails does not keep the others from running."""
    from memopt.train import report
    from memopt.train.launch import RunFailed, launch
    from memopt.train.progress import Console, progress

    console = Console() if sys.stdout.isatty() else Console(width=terminal.columns(PIPED_WIDTH))
    console.print(report.setting(text, jobs[0]), markup=False, highlight=False)
    results, failures = [], []
    with progress(console, [job.spec for job in jobs], jobs[0].steps) as observer:
        for i, job in enumerate(jobs):
            observer.begin(i)
            try:
                results.append(launch(job, partial(observer.step, i)))
                observer.end(i, f"val. {results[-1].validation_loss:.3f}")
            except RunFailed as error:
                failures.append(f"{job.spec}: {error}")
                observer.end(i, "failed")
    if results:
        console.print(report.table(results))
        for note in report.notes(results):
            console.print(note, markup=False, highlight=False)
    return results, [*failures, *(sentence for result in results for sentence in result.mismatches)]


def _record(text: Text, results: Sequence[Result], failures: Sequence[str]) -> dict[str, Any]:
    from memopt.train.report import to_json

    return {
        "text": text.name,
        "text_bytes": len(text.content),
        "entropy": text.entropy,
        "runs": [to_json(result) for result in results],
        "failures": list(failures),
    }
