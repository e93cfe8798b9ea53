"""A curve in a terminal, and the same in a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, isfinite, log10
from pathlib import Path
from textwrap import wrap

from memopt.cli.output.files import check_picture
from memopt.cli.output.terminal import columns
from memopt.core.extras import require

#: Characters that the scale and a space take at most.
_SCALE = 16
#: Dots of one braille cell, by column and row from the top.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def width() -> int:
    """Characters of a curve beside its scale, on this terminal."""
    return max(20, columns() - _SCALE)


def terminal(
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    width: int = 64,
    height: int = 12,
    log_x: bool = False,
    x_label: str = "",
    y_label: str = "",
) -> list[str]:
    """Lines of text: a braille curve of the finite points, two by four dots to a character, with its scales.

    >>> print("\\n".join(terminal([0, 1, 2, 3], [0, 1, 2, 3], width=2, height=1)))
    3 ⡠⠊
      0 … 3
    """
    points = [(log10(x) if log_x else x, y) for x, y in zip(xs, ys, strict=True) if isfinite(x) and isfinite(y)]
    if not points:
        return ["(no finite point)"]
    cells = [[0] * width for _ in range(height)]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    for column, row in _dots(points, (left, right), (low, high), width * 2, height * 4):
        cells[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
    marks = {0: f"{high:.4g}", height - 1: f"{low:.4g}"} if height > 1 else {0: f"{high:.4g}"}
    margin = max(map(len, marks.values()))
    lines = [f"{y_label:>{margin}}"] if y_label else []
    lines += [f"{marks.get(i, ''):>{margin}} " + "".join(chr(0x2800 + c) for c in row) for i, row in enumerate(cells)]
    first, last = (f"{10**x if log_x else x:.4g}" for x in (left, right))
    lines.append(" " * (margin + 1) + f"{first} … {last}" + (f"  {x_label}" if x_label else ""))
    return lines


def _dots(
    points: Sequence[tuple[float, float]], x: tuple[float, float], y: tuple[float, float], width: int, height: int
) -> list[tuple[int, int]]:
    """``(column, row from the top)`` of every dot: points, and lines between neighbours."""

    def at(value: float, limits: tuple[float, float], size: int) -> int:
        span = limits[1] - limits[0]
        return min(floor((value - limits[0]) / span * size), size - 1) if span else 0

    found = []
    before = None
    for px, py in points:
        column, row = at(px, x, width), height - 1 - at(py, y, height)
        steps = max(abs(column - before[0]), abs(row - before[1]), 1) if before else 1
        for i in range(1, steps + 1):
            share = i / steps
            found.append(
                (round(before[0] + (column - before[0]) * share), round(before[1] + (row - before[1]) * share))
                if before
                else (column, row)
            )
        before = column, row
    return found


def save_png(
    path: str | Path,
    xs: Sequence[float],
    ys: dict[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    marks: dict[str, float] | None = None,
) -> None:
    """One curve for each entry of ``ys``, and a vertical line for each of ``marks``. Raises ImportError, with the line
    that installs it, where matplotlib is missing, and ValueError for a file that is no picture."""
    check_picture(path)
    require("matplotlib", "a plot").use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for i, (name, values) in enumerate(ys.items()):
        axes.plot(xs, values, label=name, linewidth=2 if i == 0 else 1, alpha=1 if i == 0 else 0.45)
    for i, (name, x) in enumerate((marks or {}).items()):
        axes.axvline(x, linestyle="--", color=f"C{i + 2}", label=f"{name}: {x:.1e}")
    if log_x:
        axes.set_xscale("log")
    axes.set_title("\n".join(wrap(title, 80)), fontsize=11)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(ys) + len(marks or {}) > 1:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
