"""Ten thousand random combinations of flags: what is said, refused and how, and whether more ever needs less.

    python benchmarks/estimates_combinations.py [--count 10000] [--write]

Small models of several kinds with two layers, random flags and specs, a random card. A combination is said or refused
with one sentence; none ends in a traceback, none FITS without activations, and at least <= expected <= at most for
each figure. Then pairs that differ in one flag which adds something (a larger batch, a longer sequence, a larger rank,
more adapted layers, an output that is kept, wider gradients): by how much a figure falls, without and with what
torch's allocator adds of its own. Needs no torch and no GPU;
``--write`` writes ``benchmarks/results/estimates_combinations.json`` and ``.md``. A part of it is
``tests/estimate/test_estimators_flags.py``.
"""

from __future__ import annotations

import random
import sys
import traceback
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from typing import Any

from provenance import write_result

from estimators import estimate
from estimators.memory.memory_row import FIGURES

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.estimate.test_estimators_flags import RISING, SEED, SHORT, asked_for, drawn, rising

RESULTS = Path(__file__).parent / "results"
CARDS = (2**28, 2**30, 2**34)
BOUNDS = ("low", "expected", "high")


def combinations(count: int) -> dict[str, Any]:
    rng, found, sentences = random.Random(SEED), Counter(), Counter()
    wrong: list[str] = []
    for _ in range(count):
        name, spec, given = drawn(rng)
        gpu = rng.choice(CARDS)
        try:
            e = estimate(SHORT[name], spec, gpu=gpu, **given)
        except ValueError as error:  # InputError and SpecError: one sentence
            found["refused"] += 1
            sentences[type(error).__name__] += 1
            if not str(error).isprintable() or not 10 < len(str(error)) < 700:
                wrong.append(f"sentence: {name} {spec} {given}")
            continue
        except Exception:
            found["traceback"] += 1
            wrong.append(f"traceback: {name} {spec} {given}: {traceback.format_exc(limit=-1)}")
            continue
        column = e.columns[0]
        found[f"said: {e.verdict(column) or 'no verdict'}"] += 1
        if e.verdict(column) == "FITS" and (e.activations is None or e.without):
            wrong.append(f"FITS without {e.without}: {name} {spec} {given}")
        bounds = [tuple(getattr(column, figure)) for figure in FIGURES]
        if any(not 0 <= low <= expected <= high for low, expected, high in bounds):
            wrong.append(f"bounds: {name} {spec} {given}")
    return {"count": count, "found": dict(sorted(found.items())), "refused_by": dict(sentences), "wrong": wrong}


def pairs(count: int) -> dict[str, Any]:
    """Figures that fall, by figure and bound: without what the allocator adds of its own, and with it. How many, and
    the largest fall in percent and in MiB."""
    rng, compared = random.Random(SEED + 1), 0
    falls: dict[str, dict[str, list[tuple[float, float, str]]]] = {"asked for": {}, "with the allocator's": {}}
    for _ in range(count):
        name, spec, given, key = rising(rng)
        before = None
        for value in RISING[key]:
            try:
                column = estimate(SHORT[name], spec, **{**given, key: value}).columns[0]
            except ValueError:
                break
            whole = {(figure, bound): getattr(getattr(column, figure), bound) for figure in FIGURES for bound in BOUNDS}
            now = {"asked for": asked_for(column), "with the allocator's": whole}
            compared += before is not None
            for kind, figures in now.items() if before else ():
                for which, nbytes in figures.items():
                    fell = before[kind][which] - nbytes
                    if fell > 0:
                        case = f"{name} {spec} {key}={value} {given}"
                        found = (100 * fell / before[kind][which], fell / 2**20, case)
                        falls[kind].setdefault(" ".join(which), []).append(found)
            before = now
    worst = {
        kind: {
            which: {"fell": len(all_), "percent": max(all_)[0], "mib": max(m for _, m, _ in all_), "case": max(all_)[2]}
            for which, all_ in sorted(of_kind.items())
        }
        for kind, of_kind in falls.items()
    }
    return {"pairs": compared, "falls": worst}


def report(first: dict[str, Any], second: dict[str, Any]) -> str:
    lines = ["# Random combinations of flags", "", f"{first['count']:,} combinations:", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {n:,} |" for name, n in first["found"].items())]
    lines += [f"| against the rules | {len(first['wrong'])} |", "", *first["wrong"]]
    fell = sum(f["fell"] for f in second["falls"]["asked for"].values())
    lines += [
        f"{second['pairs']:,} pairs of which the second asks for more. Figures that fall, of nine each: {fell} without",
        "what torch's allocator adds of its own; with it, since blocks are cut and segments filled otherwise:",
        "",
    ]
    lines += ["| figure | pairs | largest fall | in MiB |", "|---|---|---|---|"]
    lines += [
        f"| {which} | {f['fell']} | {f['percent']:.2f} % | {f['mib']:.2f} |"
        for which, f in second["falls"]["with the allocator's"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    first, second = combinations(args.count), pairs(args.count // 4)
    text = report(first, second)
    print(text)
    if args.write:
        write_result(RESULTS / "estimates_combinations.json", {"combinations": first, "pairs": second})
        (RESULTS / "estimates_combinations.md").write_text(text)


if __name__ == "__main__":
    main()
