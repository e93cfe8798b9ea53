"""An estimate as a table of 80 columns, and as JSON."""

from __future__ import annotations

from typing import Any

from estimators.estimate import PAGEABLE, PHASES, WITHOUT, Column, Estimate
from estimators.units import gib

#: Version of the JSON form. Keys are only ever added under one number.
SCHEMA = "memopt.estimate/1"
WIDTH = 80
_CODES = {"green": "32", "red": "31", "bold": "1", "dim": "2"}


def as_json(e: Estimate) -> dict[str, Any]:
    """Plain dictionaries and lists; ``docs/estimates.md`` says what each key means."""
    return {
        "schema": SCHEMA,
        "model": {
            "name": e.model.name,
            "parameters": e.parameters,
            "trainable": e.trainable,
            "tensors": len(e.model.shapes),
            "provenance": e.model.provenance,
            "notes": list(e.model.notes),
        },
        "weights": e.weights,
        "gradients": e.gradients,
        "world_size": e.world_size,
        "gpu_nbytes": e.gpu,
        "without": list(WITHOUT),
        "fits": e.fits,
        "specs": [_column_json(column, e.gpu) for column in e.columns],
    }


def _column_json(column: Column, gpu: int | None) -> dict[str, Any]:
    return {
        "spec": column.spec,
        "fits": None if gpu is None else not column.over(gpu),
        "over_nbytes": None if gpu is None else column.over(gpu),
        "paged_out_nbytes": None if gpu is None else column.paged_out(gpu),
        "state_nbytes": column.nbytes("state"),
        "peak": {
            "phase": column.peak.phase,
            "gpu_nbytes": column.peak.nbytes,
            "pageable_nbytes": column.peak.pageable,
            "host_nbytes": column.peak.host,
        },
        "rows": [{**row._asdict(), "phases": list(row.phases)} for row in column.rows],
    }


def as_text(e: Estimate, colour: bool = False) -> str:
    """Title, one line per spec, and what the figures do not contain."""
    return "\n".join([*_title(e, colour), "", *_table(e, colour), "", *_footer(e)])


def _paint(text: str, style: str, colour: bool) -> str:
    return f"\033[{_CODES[style]}m{text}\033[0m" if colour and text.strip() else text


def _title(e: Estimate, colour: bool) -> list[str]:
    counted = f"{e.parameters:,} parameters"
    if e.trainable != e.parameters:
        counted += f", {e.trainable:,} of them trainable"
    title = counted if e.model.name == counted else f"{e.model.name}: {counted}"
    dtypes = f"weights in {e.weights}, gradients in {e.gradients}"
    ranks = f"; bytes on each of {e.world_size} data-parallel GPUs" if e.world_size > 1 else ""
    return [_paint(title, "bold", colour), *wrap(dtypes + ranks)]


def _table(e: Estimate, colour: bool) -> list[str]:
    """Plain cells are aligned first and painted after, so that colour cannot shift a column."""
    header = ["spec", "weights", "gradients", "state", "GPU peak", "state/parameter" if e.gpu is None else gib(e.gpu)]
    rows = [_cells(column, e.gpu) for column in e.columns]
    if e.gpu is None:
        for row, column in zip(rows, e.columns, strict=True):
            row[5] = f"{column.nbytes('state') / max(1, e.trainable):.3f} bytes"
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(6)]
    lines = [_paint(_line(header, widths), "dim", colour)]
    for row, column in zip(rows, e.columns, strict=True):
        lines.append(_verdict_painted(_line(row, widths), row[5], column, e.gpu, colour))
    return lines


def _cells(column: Column, gpu: int | None) -> list[str]:
    pageable = column.nbytes("state", PAGEABLE)
    return [
        column.spec,
        gib(column.nbytes("weights") + column.nbytes("buffers")),
        gib(column.nbytes("gradients")),
        gib(column.nbytes("state")) + (" p" if pageable else "  "),
        gib(column.peak.nbytes),
        "" if gpu is None else verdict(column, gpu),
    ]


def verdict(column: Column, gpu: int) -> str:
    """``FITS``, or by how much it does not."""
    if column.over(gpu):
        return f"over by {gib(column.over(gpu))}"
    return "FITS, paging" if column.paged_out(gpu) else "FITS"


def _line(cells: list[str], widths: list[int]) -> str:
    first, *middle, last = (f"{cell:{'<' if i in (0, 5) else '>'}{w}}" for i, (cell, w) in
                            enumerate(zip(cells, widths, strict=True)))  # fmt: skip
    return "  ".join([first, *middle, last]).rstrip()


def _verdict_painted(line: str, cell: str, column: Column, gpu: int | None, colour: bool) -> str:
    if gpu is None:
        return line
    return line[: len(line) - len(cell)] + _paint(cell, "red" if column.over(gpu) else "green", colour)


def _footer(e: Estimate) -> list[str]:
    lines = []
    if any(column.peak.pageable for column in e.columns):
        lines.append("p: pageable, moves to host memory while the GPU is full; not in the GPU peak.")
    phases = dict.fromkeys(column.peak.phase for column in e.columns)
    lines.append(f"Peak over {', '.join(PHASES)}: in the phase {', '.join(phases)}, without {_listed(WITHOUT)}, "
                 "which come on top.")  # fmt: skip
    lines += [f"Note: {note}." for note in e.model.notes]
    return [part for line in lines for part in wrap(line)]


def wrap(text: str, width: int = WIDTH) -> list[str]:
    """Lines of at most ``width`` characters, broken at spaces (textwrap's import takes longer than an estimate).

    >>> wrap("one two three", 8)
    ['one two', 'three']
    """
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _listed(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"
