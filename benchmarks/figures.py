"""The figures of the documents, drawn from ``results/*.json``: nothing is measured here.

    python benchmarks/figures.py

Written: docs/images/quality.svg, estimates.svg and step.svg.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
#: Steps that are drawn of all that were timed.
STEPS = ("torch AdamW fused", "memopt adamw", "memopt adamw-bf16", "memopt adamw-8bit", "memopt adamw-4bit")


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def quality(axes: Axes) -> None:
    """Every seed's loss over the bytes of state."""
    for row in read("quality")["summary"]:
        if row["case"] != row["spec"]:
            continue  # the drift of 32-bit state against itself is in the table
        bytes_ = [row["state_bytes"] / 2**20] * len(row["losses"])
        (points,) = axes.plot(bytes_, row["losses"], "o", alpha=0.6)
        axes.plot(bytes_[:1], [row["mean"]], "_", markersize=16, color=points.get_color())
        axes.annotate(f"  {row['spec']}", (bytes_[0], row["mean"]), fontsize=8, va="center")
    axes.set(xscale="log", xlabel="state, MiB", ylabel="validation loss, nats per byte")
    axes.set_title("Loss by format: three seeds and their mean", fontsize=10)


def estimates(axes: Axes) -> None:
    """What was measured over what was expected, with the bounds that were stated."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in read("estimates_measured")["rows"]:
        groups.setdefault(row["figure"], []).append(row)
    for figure, rows in groups.items():
        expected = [row["expected"] / 2**30 for row in rows]
        measured = [row["measured"] / 2**30 for row in rows]
        below = [e - min(e, row["low"] / 2**30) for e, row in zip(expected, rows, strict=True)]
        above = [max(e, row["high"] / 2**30) - e for e, row in zip(expected, rows, strict=True)]
        axes.errorbar(
            measured, expected, yerr=(below, above), fmt="o", markersize=3, linewidth=0.6, alpha=0.6, label=figure
        )
    ends = axes.get_xlim()
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.legend(fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="measured, GiB", ylabel="expected, at least to at most, GiB")
    axes.set_title("Estimates beside published and measured runs", fontsize=10)


def step(axes: Axes) -> None:
    """Time of a step by its bytes: what is read and written decides."""
    found = read("step_cpu")
    rows = [row for name in STEPS for row in found["rows"] if row["name"] == name]
    axes.barh([row["name"] for row in rows], [row["ms"] for row in rows])
    for i, row in enumerate(rows):
        axes.annotate(f" {row['bytes_per_parameter']:.0f} bytes a parameter", (row["ms"], i), fontsize=8, va="center")
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set(xlabel="ms")
    axes.set_title(f"A step of {found['numel'] / 1e6:.1f} M parameters, {found['threads']} threads", fontsize=10)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "memopt"  # the same results are the same file
    for draw in (quality, estimates, step):
        figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
        draw(axes)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(IMAGES / f"{draw.__name__}.svg", metadata={"Date": None})
        pyplot.close(figure)
        print(f"written: {(IMAGES / draw.__name__).relative_to(ROOT)}.svg")


if __name__ == "__main__":
    main()
