"""An estimate as a table of 80 columns, or of as few as 60."""

from __future__ import annotations

from estimators.memory.memory_row import FIGURES, GPU, PAGEABLE, PHASES
from estimators.parallel.degrees import cards
from estimators.report.lines import WIDTH, wrap
from estimators.result import Column, Estimate
from estimators.training import describe_training
from estimators.units import gib

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


def as_text(e: Estimate, colour: bool = False, bars: bool = False, width: int = WIDTH) -> str:
    """Title, one line per spec, bars where asked for, what to change first, and what the figures do not contain, in
    lines of at most ``width`` characters."""
    lines = [*_title(e, colour, width), "", *_table(e, colour, width), ""]
    if bars:
        from estimators.report.bars import bars as drawn

        lines += [*drawn(e, colour, width), ""]
    prose = [part for line in (*_advice(e), *_footer(e)) for part in wrap(line, width)]
    return "\n".join([*lines, *_figures(e, colour, width), *prose])


def _paint(text: str, style: str, colour: bool) -> str:
    return f"\033[{_CODES[style]}m{text}\033[0m" if colour and text.strip() else text


def _title(e: Estimate, colour: bool, width: int) -> list[str]:
    counted = f"{e.parameters:,} parameters"
    if e.trainable != e.parameters:
        counted += f", {e.trainable:,} of them trainable"
    title = counted if e.model.name == counted else f"{e.model.name}: {counted}"
    dtypes = f"{e.weights} weights and gradients"
    if e.weights != e.gradients:
        dtypes = f"{e.weights} weights, {e.gradients} gradients"
    number = cards(e.training, e.world_size)
    of = f", one of {number:,}" if number > e.world_size else ""
    data = f", {e.world_size:,} data-parallel ranks" if e.world_size > 1 else ""
    ranks = f"; bytes of a GPU{of}{data}" if number > 1 else ""
    step = wrap(describe_training(e.training, e.model.inputs is not None), width)
    head = [_paint(line, "bold", colour) for line in wrap(title, width)]
    return [*head, *wrap(dtypes + ranks, width), *(step if step != [""] else [])]


def _table(e: Estimate, colour: bool, width: int) -> list[str]:
    """Plain cells are aligned first and painted after, so that colour cannot shift a column. Where all of it is too
    wide for the terminal, a spec and its verdict have a line of their own above the figures."""
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
    colours = ["" if e.gpu is None else _COLOURS[e.verdict(column)] for column in e.columns]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= width else " "
    if sum(widths) + len(widths) - 1 > width:
        return _two_lines(header, rows, colours, colour)
    lines = [_paint(_line(header, widths, gap), "dim", colour)]
    for row, style in zip(rows, colours, strict=True):
        line = _line(row, widths, gap)
        lines.append(_painted_end(line, row[-1], style, colour) if style else line)
    return lines


def _two_lines(header: list[str], rows: list[list[str]], colours: list[str], colour: bool) -> list[str]:
    figures = [row[1:-1] for row in (header, *rows)]
    widths = [0, *(max(map(len, cells)) for cells in zip(*figures, strict=True)), 0]
    verdicts = any(colours)
    head = [f"spec: {header[-1]}"] if verdicts else []
    head.append(_line(["", *figures[0], "" if verdicts else header[-1]], widths, " "))
    lines = [_paint(line, "dim", colour) for line in head]
    for row, cells, style in zip(rows, figures[1:], colours, strict=True):
        lines.append(row[0] + (f": {_paint(row[-1], style, colour)}" if style else ""))
        lines.append(_line(["", *cells, "" if style else row[-1]], widths, " "))
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


def _line(cells: list[str], widths: list[int], gap: str) -> str:
    """Figures to the right, the first and the last cell to the left."""
    first = f"{cells[0]:<{widths[0]}}"
    middle = (f"{cell:>{width}}" for cell, width in zip(cells[1:-1], widths[1:-1], strict=True))
    return gap.join([first, *middle, cells[-1]]).rstrip()


def _painted_end(line: str, cell: str, style: str, colour: bool) -> str:
    return line[: len(line) - len(cell)] + _paint(cell, style, colour)


def best(e: Estimate) -> Column:
    """The spec with the lowest peak."""
    return min(e.columns, key=lambda c: c.peak.nbytes)


def _figures(e: Estimate, colour: bool, width: int) -> list[str]:
    """The three figures of the spec with the lowest peak, with what else says them."""
    column = best(e)
    if not e.activations or column.low == column.high:
        return []
    named = column.spec if len(column.spec) <= _LONGEST else ""
    lines = [[named, "at least", "expected", "at most", ""]]
    lines += [[name, *map(gib, getattr(column, name)), SHOWN_BY[name]] for name in FIGURES]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    cells = [_line(line, [*widths, 0], "  ") for line in lines]
    if max(map(len, cells)) > width:  # what else says them goes under the figure
        figures = [_line([*line[:-1], ""], [*widths, 0], "  ") for line in lines]
        cells = [figures[0], *(f"{text}\n  {SHOWN_BY[name]}" for text, name in zip(figures[1:], FIGURES, strict=True))]
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
    return lines


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
    return [*lines, *(f"Note: {note}." for note in e.model.notes)]


def _listed(words: tuple[str, ...]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
