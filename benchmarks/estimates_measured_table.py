"""What estimates_measured.py has found: errors over rows, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any, NamedTuple

from estimators.allocator import overhead
from estimators.memory import runtime

MIB, GIB = 2**20, 2**30


class Figure(NamedTuple):
    """One measured figure beside the estimate of it; bytes."""

    row: str
    group: str
    figure: str
    measured: float
    low: int
    expected: int
    high: int

    @property
    def error(self) -> float:
        """Percent of the measurement; positive where the estimate is above it."""
        return 100 * (self.expected / self.measured - 1)

    @property
    def slack(self) -> float:
        """By how many percent the upper bound is above the measurement."""
        return 100 * (self.high / self.measured - 1)


class Unsaid(NamedTuple):
    """A published row that the command line cannot say, and why."""

    row: str
    reason: str


# Figures over rows -----------------------------------------------------------------------------------------------


def summary(figures: Sequence[Figure]) -> dict[str, float]:
    """Of some rows of one figure: errors in percent, and what the upper bound does."""
    errors = sorted(abs(f.error) for f in figures)
    return {
        "rows": len(figures),
        "median": median(errors),
        "mean": mean(errors),
        "p90": errors[min(len(errors) - 1, -(-9 * len(errors) // 10) - 1)],
        "worst": errors[-1],
        "above_high": sum(f.measured > f.high for f in figures),
        "median_slack": median(f.slack for f in figures),
    }


def groups(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """By attention and figure, then by figure alone."""
    found: dict[str, list[Figure]] = {}
    for f in figures:
        found.setdefault(f"{f.group} {f.figure}", []).append(f)
    for f in figures:
        found.setdefault(f"all {f.figure}", []).append(f)
    return found


def table(figures: Sequence[Figure]) -> list[str]:
    lines = [
        "| rows | n | median | mean | 90th percentile | worst | above `at most` | median of `at most` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, chosen in groups(figures).items():
        s = summary(chosen)
        percents = " | ".join(f"{s[key]:.2f} %" for key in ("median", "mean", "p90", "worst"))
        lines.append(f"| {name} | {s['rows']} | {percents} | {s['above_high']} | {s['median_slack']:.1f} % |")
    return lines


def together(figures: Sequence[Figure]) -> str:
    """Whatever was measured, one after the other."""
    s = summary(figures)
    named = {"median": "in the median", "p90": "at the 90th percentile", "worst": "at worst"}
    percents = (f"{s[key]:.2f} % {what}" for key, what in named.items())
    return f"All {s['rows']} together: {', '.join(percents)}."


def each(figures: Sequence[Figure]) -> list[str]:
    lines = [
        "| row | group | figure | measured GiB | at least | expected | at most | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for f in figures:
        gib = " | ".join(f"{n / GIB:.3f}" for n in (f.measured, f.low, f.expected, f.high))
        lines.append(f"| {f.row} | {f.group} | {f.figure} | {gib} | {f.error:+.2f} % |")
    return lines


def splits(halves: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| fitted to | loaded ahead | share | rows left out | mean | worst | above `at most` |"]
    lines.append("|---|---|---|---|---|---|---|")
    for h in halves:
        lines.append(
            f"| {', '.join(h['fitted_to'])} | {h['ahead']} | {h['share']:.3f} | {h['rows']} | {h['mean']:.2f} % | "
            f"{h['worst']:.2f} % | {h['above_high']} |"
        )
    return lines


def report(
    cards: Sequence[Figure], found: Sequence[Figure], unsaid: Sequence[Unsaid], halves: Sequence[dict[str, Any]]
) -> str:
    parts = [
        "# The calculator beside measured memory",
        "",
        "`python benchmarks/estimates_measured.py --write`; who measured what: `benchmarks/measured/README.md`.",
        "Errors are of `expected`, in percent of the measurement; the last column is how far `at most` is above it.",
        "",
        "## Tesla T4, LoRA and QLoRA",
        "",
        *table(cards),
        "",
        "Fitted to these rows: how many 16-bit tensors are loaded ahead of the one that is quantised\n"
        f"(`estimators.allocator.overhead.AHEAD`, {overhead.AHEAD}), the share of what moves by which `at most` is\n"
        f"above the replay (`estimators.memory.runtime.SPREAD`, {runtime.SPREAD:.1f} %), and the CUDA context of a\n"
        "T4. "
        "The first two fitted to some of the models, and judged by the process of the others:",
        "",
        *splits(halves),
        "",
        "## Published figures",
        "",
        *table(found),
        "",
        together(found),
        "",
        f"{len(unsaid)} rows cannot be said:",
        "",
        *[f"- {u.row}: {u.reason}" for u in unsaid],
        "",
        "## Every row",
        "",
        *each([*cards, *found]),
    ]
    return "\n".join(parts) + "\n"
