"""The calculator beside memory that was measured on real GPUs by others: ``benchmarks/measured/``.

    python benchmarks/estimates_measured.py [--write]

For every row the estimate of each figure that was measured (allocated: ``torch.cuda.max_memory_allocated``; reserved:
``max_memory_reserved``; process: what nvidia-smi shows) with its bounds, then the median and the worst error, and how
often and by how much the upper bound holds. ``--write`` writes ``benchmarks/results/estimates_measured.json`` and
``.md``. Needs neither a GPU nor torch; the quick half of it is ``tests/estimate/test_estimates_measured.py``.
"""

from __future__ import annotations

import csv
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import litgpt_model
from estimates_measured_table import GIB, MIB, Figure, Unsaid, groups, report, summary
from provenance import write_result

from estimators.allocator import overhead
from estimators.calculator import estimate
from estimators.memory import runtime
from estimators.memory.memory_row import PHASES
from estimators.result import Estimate
from memopt.cli import estimate as verb
from memopt.cli.flags.step import given

MEASURED = Path(__file__).parent / "measured"
RESULTS = Path(__file__).parent / "results"
FIGURES = ("allocated", "reserved", "process")


def said(command: str) -> Estimate:
    """The estimate of one ``memopt estimate`` command with one spec, or of LitGPT's own model (``litgpt_model``)."""
    own, _, rest = command.partition(" ")
    if own == "litgpt":
        return litgpt_model.said(rest)
    parser = ArgumentParser(exit_on_error=False)
    verb.add_arguments(parser)
    args = parser.parse_args(shlex.split(command))
    model = MEASURED / args.model if args.model.startswith("configs/") else args.model
    return estimate(
        model,
        args.optim[0],
        gpu=args.gpu,
        weights=args.weights,
        gradients=args.gradients,
        world_size=int(args.world),
        **given(args),
    )


def three(e: Estimate) -> dict[str, tuple[int, int, int]]:
    """Low, expected and high of each figure, as the documented JSON has them."""
    peak = e.to_json()["specs"][0]["peak"]
    return {name: tuple(peak[name][which] for which in ("low", "expected", "high")) for name in FIGURES}


# The T4 ----------------------------------------------------------------------------------------------------------


def t4_rows() -> list[dict[str, str]]:
    with open(MEASURED / "t4_lora.csv", newline="") as file:
        return list(csv.DictReader(file))


def t4_command(row: dict[str, str]) -> str:
    """The run of one row as options of ``memopt estimate``."""
    quantised = "" if row["quantised"] == "none" else f" --quantised {row['quantised']}"
    return (
        f"{row['model']} --seq {row['seq']} --batch {row['batch']} --weights {row['precision']}"
        f" --attention {row['attention']} --checkpointing {row['checkpointing']} --lora {row['lora_rank']}"
        f" --lora-targets {row['lora_targets'].replace(' ', ',')}{quantised} --outputs kept --optim {row['optimizer']}"
        " --gpu t4"
    )


def t4() -> Iterator[Figure]:
    """Three figures of every run of the T4."""
    for number, row in enumerate(t4_rows()):
        name = f"{number}: {row['model'].partition('/')[2]} {row['quantised']} {row['batch']}x{row['seq']}"
        found = three(said(t4_command(row)))
        for figure, bounds in found.items():
            measured = float(row["process_mib" if figure == "process" else f"peak_{figure}_mib"]) * MIB
            yield Figure(name, row["attention"], figure, measured, *bounds)


def left_out() -> list[dict[str, Any]]:
    """What was fitted to these runs, fitted to every choice of half of the models instead and judged by the others: how
    many tensors are loaded ahead (:func:`fitted`) and the share of what moves by which ``at most`` is
    above the replay (the largest shortfall and a margin)."""
    rows, known = t4_rows(), {}
    for ahead in AHEADS:
        overhead.AHEAD = ahead
        known[ahead] = {command: _parts(said(command)) for command in {t4_command(row) for row in rows}}
    overhead.AHEAD = FITTED
    models = sorted({row["model"] for row in rows})
    found = []
    for chosen in (c for n in (2, 3) for c in combinations(models, n)):
        fit = [row for row in rows if row["model"] in chosen]
        rest = [row for row in rows if row["model"] not in chosen]
        ahead = fitted(known, fit)
        share = max(_short(known[ahead], row) for row in fit) + runtime.MARGIN / 100
        errors = [abs(_error(known[ahead], row)) for row in rest]
        above = sum(_short(known[ahead], row) > share for row in rest)
        found.append(
            {
                "fitted_to": [name.partition("/")[2] for name in chosen],
                "ahead": ahead,
                "share": round(share, 4),
                "rows": len(rest),
                "mean": 100 * mean(errors),
                "worst": 100 * max(errors),
                "above_high": above,
            }
        )
    return found


def fitted(known: dict[int, dict[str, tuple[int, int, int]]], rows: Sequence[dict[str, str]]) -> int:
    """How many tensors are loaded ahead: the middle of all that are as good as the best, within the standard error of
    its mean. Models whose loading is far below their step say nothing about it: for them all are equally good."""
    errors = {a: [abs(_error(known[a], row)) for row in rows] for a in AHEADS}
    best = min(AHEADS, key=lambda a: mean(errors[a]))
    within = mean(errors[best]) + stdev(errors[best]) / len(rows) ** 0.5
    good = [a for a in AHEADS if mean(errors[a]) <= within]
    return good[(len(good) - 1) // 2]


AHEADS = (0, 4, 8, 12, 16, 20, 24)
FITTED = overhead.AHEAD


def _parts(e: Estimate) -> tuple[int, int, int]:
    """The process, what of it moves, and half of the largest tensor of a layer."""
    rows = [r for r in e.rows if r.what != "runtime"]
    moving = max(runtime.of_phase(rows, phase, ("weights", "buffers")) for phase in PHASES)
    assert e.activations is not None
    assert e.activations.walked is not None
    ops = [op for s in e.activations.walked.segments if s.kind == "layer" for op in s.tape.ops]
    return e.columns[0].process.expected, moving, max(op.out.nbytes for op in ops) // 2


def _error(known: dict[str, tuple[int, int, int]], row: dict[str, str]) -> float:
    return known[t4_command(row)][0] / (float(row["process_mib"]) * MIB) - 1


def _short(known: dict[str, tuple[int, int, int]], row: dict[str, str]) -> float:
    """By what share of what moves the process is above the expected value and the largest tensor."""
    process, moving, block = known[t4_command(row)]
    return (float(row["process_mib"]) * MIB - process - block) / moving


# Published figures -----------------------------------------------------------------------------------------------

#: What a figure was measured with -> the figure of ours that it is held to. Where it is not said, it is one that
#: a monitor shows between steps: at least what is reserved.
KINDS = {
    "active": "allocated",
    "allocated": "allocated",
    "reserved": "reserved",
    "nvidia-smi": "process",
    "peak": "reserved",
    "peak (alloc/reserved not said)": "reserved",
    "not said": "reserved",
}


def published() -> Iterator[Figure | Unsaid]:
    """Every published row that a command can say, and the others with the reason."""
    with open(MEASURED / "published_commands.csv", newline="") as file:
        commands = {row["id"]: row for row in csv.DictReader(file)}
    with open(MEASURED / "published.csv", newline="") as file:
        for row in csv.DictReader(file):
            today = commands[row["id"]]
            if not today["command"]:
                yield Unsaid(row["id"], today["reason"])
                continue
            figure = KINDS[row["kind"]]
            found = three(said(today["command"]))
            yield Figure(row["id"], row["class"], figure, float(row["measured_gib"]) * GIB, *found[figure])


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table and the JSON into benchmarks/results/")
    args = parser.parse_args()
    cards, rows = list(t4()), list(published())
    found = [r for r in rows if isinstance(r, Figure)]
    unsaid = [r for r in rows if isinstance(r, Unsaid)]
    halves = left_out()
    text = report(cards, found, unsaid, halves)
    print(text.partition("## Every row")[0])
    if args.write:
        as_json: dict[str, Any] = {
            "t4": {name: summary(chosen) for name, chosen in groups(cards).items()},
            "left_out": halves,
            "published": {name: summary(chosen) for name, chosen in groups(found).items()},
            "rows": [f._asdict() for f in [*cards, *found]],
            "unsaid": [u._asdict() for u in unsaid],
        }
        write_result(RESULTS / "estimates_measured.json", as_json)
        (RESULTS / "estimates_measured.md").write_text(text)


if __name__ == "__main__":
    main()
