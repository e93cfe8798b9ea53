"""The calculator beside memory that was measured on real GPUs: the bars of ``benchmarks/estimates_measured.py``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def measured():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import estimates_measured

        yield estimates_measured
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_published_row_is_estimated_or_has_a_reason(measured) -> None:
    with open(measured.MEASURED / "published.csv", newline="") as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    found = list(measured.published())
    assert [f.row for f in found] == ids
    assert all(f.reason for f in found if isinstance(f, measured.Unsaid))
    said = [f for f in found if isinstance(f, measured.Figure)]
    together = measured.summary(said)
    assert (together["rows"], together["median"] < 5, together["p90"] < 12) == (27, True, True)
    allocated = measured.summary([f for f in said if f.figure == "allocated"])
    assert (allocated["median"] < 1, allocated["worst"] < 5, allocated["above_high"]) == (True, True, 0)


def test_every_run_of_the_t4_is_within_the_bars(measured) -> None:
    figures = list(measured.t4())
    assert len({f.row for f in figures}) == len(measured.t4_rows()) == 67
    assert all(0 < f.low <= f.expected <= f.high for f in figures)
    found = {name: measured.summary(chosen) for name, chosen in measured.groups(figures).items()}
    # allocated: median and worst error in percent
    assert (found["sdpa allocated"]["median"], found["sdpa allocated"]["worst"]) < (0.5, 2)
    assert found["sdpa allocated"]["worst"] < 2
    assert found["eager allocated"]["median"] < 1
    assert found["eager allocated"]["worst"] < 4
    process = found["all process"]
    assert process["mean"] < 3
    assert process["worst"] < 10
    assert process["above_high"] == 0
    assert process["median_slack"] < 12
