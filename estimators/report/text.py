"""An estimate as a table of 80 columns."""

from __future__ import annotations

from estimators.memory.memory_row import FIGURES, GPU, PAGEABLE, PHASES
from estimators.parallel.degrees import cards
from estimators.result import Column, Estimate
from estimators.training import describe
from estimators.units import gib

WIDTH = 80
_CODES = {"green": "32", "yellow": "33", "red": "31", "bold": "1", "dim": "2"}
#: figure -> who else says it
SHOWN_BY = {
    "allocated": "torch.cuda.max_memory_allocated",
    "reserved": "torch.cuda.max_memory_reserved",
    "process": "nvidia-smi",
}
#: Longest spec that stands in the table of figures.
_LONGEST = 16
#: verdict -> colour
_COLOURS = {"FITS": "green", "TIGHT": "yellow", "over": "red", "": "dim"}


def as_text(e: Estimate, colour: bool = False, bars: bool = False) -> str:
    """Title, one line per spec, bars where asked for, what to change first, and what the figures do not contain."""
    lines = [*_title(e, colour), "", *_table(e, colour), ""]
    if bars:
        from estimators.report.bars import bars as drawn

        lines += [*drawn(e, colour), ""]
    return "\n".join([*lines, *_figures(e, colour), *_advice(e), *_footer(e)])


def _paint(text: str, style: str, colour: bool) -> str:
    return f"\033[{_CODES[style]}m{text}\033[0m" if colour and text.strip() else text


def _title(e: Estimate, colour: bool) -> list[str]:
    counted = f"{e.parameters:,} parameters"
    if e.trainable != e.parameters:
        counted += f", {e.trainable:,} of them trainable"
    title = counted if e.model.name == counted else f"{e.model.name}: {counted}"
    dtypes = f"{e.weights} weights and gradients"
    if e.weights != e.gradients:
        dtypes = f"{e.weights} weights, {e.gradients} gradients"
    number = cards(e.training, e.world_size)
    of = f" of {number:,}" if number > e.world_size else ""
    ranks = f"; bytes per GPU{of}, {e.world_size} data-parallel ranks" if number > 1 else ""
    step = wrap(describe(e.training, e.model.inputs is not None))
    return [_paint(title, "bold", colour), dtypes + ranks, *(step if step != [""] else [])]


def _table(e: Estimate, colour: bool) -> list[str]:
    """Plain cells are aligned first and painted after, so that colour cannot shift a column."""
    header = [
        "spec",
        "weights",
        "gradients",
        "state",
        *(["activ."] if e.activations else []),
        "GPU peak",
        "state/parameter" if e.gpu is None else gib(e.gpu),
    ]
    rows = [_cells(column, e) for column in e.columns]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    # Too wide for a terminal: narrow gaps, or else each spec on a line of its own and its figures on the next.
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    two_lines = sum(widths) + len(widths) - 1 > WIDTH
    if two_lines:
        widths[0] = 1
    lines = [_paint(_line(header, widths, gap, two_lines), "dim", colour)]
    for row, column in zip(rows, e.columns, strict=True):
        if two_lines:
            lines.append(row[0])
        line = _line(row, widths, gap, two_lines)
        lines.append(line if e.gpu is None else _painted_end(line, row[-1], _COLOURS[e.verdict(column)], colour))
    return lines


def _cells(column: Column, e: Estimate) -> list[str]:
    mark, marked = _mark(column), any(_mark(c) for c in e.columns)
    state = column.nbytes("state")
    return [
        column.spec,
        gib(column.nbytes("weights") + column.nbytes("buffers")),
        gib(column.nbytes("gradients")),
        gib(state) + (mark or (" " if marked else "")),
        *([gib(column.nbytes("activations"))] if e.activations else []),
        gib(column.peak.nbytes),
        f"{state / max(1, e.trainable):.3f} bytes" if e.gpu is None else verdict(column, e.gpu),
    ]


def _mark(column: Column) -> str:
    """``*`` for state that the driver pages, ``^`` for state of which most is elsewhere (step counters always are)."""
    if column.nbytes("state", PAGEABLE):
        return "*"
    return "^" if 2 * column.nbytes("state", GPU) < column.nbytes("state") else ""


def verdict(column: Column, gpu: int) -> str:
    """``FITS``: at most it does. ``TIGHT``: only the expected value does. Else by how much that does not."""
    said = column.verdict(gpu)
    if said == "over":
        return f"over by {gib(column.over(gpu))}"
    return f"{said}, paging" if said and column.paged_out(gpu) else said or "no verdict"


def _line(cells: list[str], widths: list[int], gap: str, without_first: bool) -> str:
    """Figures to the right, the first and the last cell to the left."""
    first = " " * widths[0] if without_first else f"{cells[0]:<{widths[0]}}"
    middle = (f"{cell:>{width}}" for cell, width in zip(cells[1:-1], widths[1:-1], strict=True))
    return gap.join([first, *middle, cells[-1]]).rstrip()


def _painted_end(line: str, cell: str, style: str, colour: bool) -> str:
    return line[: len(line) - len(cell)] + _paint(cell, style, colour)


def best(e: Estimate) -> Column:
    """The spec with the lowest peak."""
    return min(e.columns, key=lambda c: c.peak.nbytes)


def _figures(e: Estimate, colour: bool) -> list[str]:
    """The three figures of the spec with the lowest peak, with what else says them."""
    column = best(e)
    if not e.activations or column.low == column.high:
        return []
    named = column.spec if len(column.spec) <= _LONGEST else ""
    lines = [[named, "at least", "expected", "at most", ""]]
    lines += [[name, *map(gib, getattr(column, name)), SHOWN_BY[name]] for name in FIGURES]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    cells = [_line(line, [*widths, 0], "  ", False) for line in lines]
    return [*([] if named else [column.spec]), _paint(cells[0], "dim", colour), *cells[1:], ""]


def _advice(e: Estimate) -> list[str]:
    """Why there is no verdict, and what to change first where nothing fits."""
    lines = []
    silent = next((c for c in e.columns if e.gpu is not None and not e.verdict(c)), None)
    if silent:
        lines.append(f"No verdict without {_listed(silent.without)}.")
    if e.fits is False:
        tight = "; it is tight as it is" if any(e.verdict(c) == "TIGHT" for c in e.columns) else ""
        lines.append(f"Change first: {first_change(best(e), e)}{tight}.")
    return [part for line in lines for part in wrap(line)]


def first_change(column: Column, e: Estimate) -> str:
    """The gentlest change to what is largest at the peak."""
    kinds = ("weights", "gradients", "state", "activations", "temporaries")
    largest = max(kinds, key=column.at_peak)
    size = gib(column.at_peak(largest))
    if largest == "activations" and e.training.checkpointing != "full":
        return f"--checkpointing full (activations are {size} of the peak)"
    if largest == "activations":
        return f"a shorter --seq or a smaller --batch (activations are {size} of the peak)"
    if largest == "temporaries":
        return f"the spec: temporaries of a step are {size}, none with engine='bitsandbytes'"
    if largest == "state" and "8bit" not in column.spec and "4bit" not in column.spec:
        return f"--optim adamw-8bit (state is {size} of the peak)"
    if largest in ("weights", "gradients") and not e.training.lora:
        return f"--lora 16 (weights and gradients are {gib(column.at_peak('weights') + column.at_peak('gradients'))})"
    if largest == "weights" and not e.training.quantised:
        return f"--quantised nf4 (weights are {size} of the peak)"
    return f"the card or the model: {largest} alone are {size}"


def _footer(e: Estimate) -> list[str]:
    lines = []
    if any(column.peak.pageable for column in e.columns):
        lines.append("* pageable: moves to host memory while the GPU is full; not in the GPU peak.")
    away = [f"{c.spec} {gib(c.nbytes('state') - c.nbytes('state', GPU))}" for c in e.columns if _mark(c) == "^"]
    if away:
        lines.append(f"^ on the host or on disk, not in the GPU peak: {_listed(tuple(away))}.")
    phases = ", ".join(dict.fromkeys(column.peak.phase for column in e.columns))
    without = f", without {_listed(e.without)}" if e.without else ""
    lines.append(f"GPU peak: the most of {_listed(PHASES)} (here: {phases}){without}.")
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
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
