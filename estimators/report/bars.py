"""Stacked bars of the peak, one line per spec, for a terminal."""

from __future__ import annotations

from estimators.report.lines import WIDTH, fold
from estimators.result import Column, Estimate
from estimators.units import gib

#: kind of row -> letter and colour of a terminal.
KINDS = {
    "weights": ("W", "34"),
    "buffers": ("b", "34"),
    "gradients": ("G", "36"),
    "state": ("S", "33"),
    "activations": ("A", "35"),
    "temporaries": ("T", "31"),
    "runtime": ("r", "37"),
}
_WIDTH = 60


def bars(e: Estimate, colour: bool = False, width: int = WIDTH) -> list[str]:
    """Lines of at most ``width`` characters. Each letter is the same number of bytes on every line; ``.`` goes on to
    what it is at most; ``|`` is the card's memory, where it is on the scale."""
    most = max([c.high for c in e.columns] + [e.gpu or 0]) or 1
    names = max(len(column.spec) for column in e.columns)
    narrow = max(10, min(_WIDTH, width - names - 2))
    lines = [f"{column.spec:<{names}} {_bar(column, e.gpu, most, narrow, colour)}" for column in e.columns]
    used = [kind for kind in KINDS if any(column.at_peak(kind) for column in e.columns)]
    key = ", ".join(f"{KINDS[kind][0]} {kind}" for kind in used)
    more = ", . at most" if any(c.high > c.peak.nbytes for c in e.columns) else ""
    card = f"; | is {gib(e.gpu)}" if e.gpu else ""
    under = f"{' ' * names} one letter is {gib(most // narrow)}: {key}{more}{card}"
    return [*lines, *fold(under, width, names + 1)]


def _bar(column: Column, gpu: int | None, most: int, width: int, colour: bool) -> str:
    """Cells are rounded from running sums, so that a bar is as long as its total."""
    cells: list[tuple[str, str]] = []
    total = 0
    for kind, (letter, code) in KINDS.items():
        total += column.at_peak(kind)
        cells += [(letter, code)] * (round(total * width / most) - len(cells))
    cells += [(".", "2")] * (round(column.high * width / most) - len(cells))
    if gpu:
        at = min(width, round(gpu * width / most))
        cells += [(" ", "")] * (at - len(cells))
        cells.insert(at, ("|", "1"))
    if not colour:
        return "".join(letter for letter, _ in cells).rstrip()
    return "".join(f"\033[{code}m{letter}\033[0m" if code else letter for letter, code in cells).rstrip()
