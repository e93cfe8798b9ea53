"""An estimate beside what ``memopt measure`` recorded."""

from __future__ import annotations

import json
from typing import Any

from estimators.errors import InputError, shown
from estimators.memory.memory_row import GPU
from estimators.result import Column, Estimate
from estimators.units import gib

SCHEMA = "memopt.measure/1"
#: phase of a measurement -> phases of an estimate
_PHASES = {"load": ("load",), "forward": ("forward", "loss"), "backward": ("backward",), "step": ("step",)}
#: Characters of a row; memopt measure writes some hundred.
_MOST = 2**20
#: Rows of a phase that are named where it differs.
_NAMED = 3


def read(path: str) -> dict[str, Any]:
    """A row of ``memopt measure``. Raises :class:`InputError`."""
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline(_MOST)
        if not line.strip():
            raise InputError(f"{shown(path)} is empty")
        row = json.loads(line)
    except UnicodeDecodeError:
        raise InputError(f"{shown(path)} is not a row of memopt measure: it is a binary file") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shown(path)} is not a row of memopt measure: {error}") from None
    if not isinstance(row, dict) or row.get("schema") != SCHEMA or not isinstance(row.get("phases"), dict):
        raise InputError(f"{shown(path)} is not a row of memopt measure ({SCHEMA})")
    return row


def compared(e: Estimate, row: dict[str, Any]) -> list[str]:
    """Figure by figure and phase by phase, and the rows of phases that are out of bounds."""
    if len(e.columns) != 1:
        raise InputError(f"--against needs one spec, and {len(e.columns)} were asked for: say --optim")
    column = e.columns[0]
    lines = [f"against: {row.get('name')}, torch {row.get('torch')}", ""]
    lines.append(f"{'':<20}{'measured':>11}{'at least':>11}{'expected':>11}{'at most':>11}")
    differ: list[str] = []
    figures: dict[str, tuple[int, ...]] = {
        name: tuple(getattr(column, name)) for name in ("allocated", "reserved", "process")
    }
    base = 0
    if row.get("device") == "cpu":
        # Resident memory has the interpreter and libraries in it: what was there when the first forward pass began is
        # taken to be those and the weights, and everything is counted from there.
        figures = {"process": figures["allocated"]}
        loaded = row["phases"].get("load", {}).get("process") or row.get("base_nbytes") or 0
        weights = _of(column, ("load",), "expected")
        base = max(0, loaded - weights)
        lines[0] += f"; resident memory, less {gib(base)} that is taken to be no tensor"
        if loaded < weights:
            few = f"{gib(loaded)} was resident when the first forward pass began, less than these weights"
            lines.insert(1, f"{few} ({gib(weights)}): it was another model, or one that is loaded later.")
    for name, bounds in figures.items():
        measured = row["peak"].get(name)
        if measured is not None:
            lines.append(_line(name, measured - base, bounds))
    figure = "process" if row.get("device") == "cpu" else "allocated"
    for phase, found in row["phases"].items():
        if phase not in _PHASES or found.get(figure) is None:
            continue
        bounds = tuple(_of(column, _PHASES[phase], which) for which in ("low", "expected", "high"))
        measured = found[figure] - base
        lines.append(_line(f"· {phase}", measured, bounds))
        if not bounds[0] <= measured <= bounds[2]:
            differ.append(_named(column, phase, measured - bounds[1]))
    return [*lines, "", *(differ or ["Every phase is within its bounds."])]


def _line(name: str, measured: int, bounds: tuple[int, ...]) -> str:
    mark = "" if bounds[0] <= measured <= bounds[2] else "  below" if measured < bounds[0] else "  above"
    return f"{name:<20}" + "".join(f"{gib(max(0, n)):>11}" for n in (measured, *bounds)) + mark


def _of(column: Column, phases: tuple[str, ...], which: str) -> int:
    """What is allocated in the fullest of these phases."""
    from estimators.memory.memory_row import FIGURES

    chosen = [r for r in column.rows if r.what != "runtime" or r.detail in FIGURES["allocated"]]
    return max(sum(r.bounded(which) for r in chosen if r.tier == GPU and phase in r.phases) for phase in phases)


def _named(column: Column, phase: str, by: int) -> str:
    rows = [r for r in column.rows if r.tier == GPU and r.what != "runtime" and set(_PHASES[phase]) & set(r.phases)]
    largest = sorted(rows, key=lambda r: -r.nbytes)[:_NAMED]
    what = ", ".join(
        f"{r.what} ({r.detail}) {gib(r.nbytes)}" if r.detail else f"{r.what} {gib(r.nbytes)}" for r in largest
    )
    more = "more" if by > 0 else "less"
    return f"{phase}: {gib(abs(by))} {more} than expected; its largest rows: {what}."
