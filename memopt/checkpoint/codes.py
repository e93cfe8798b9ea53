"""Which format holds which moment, for every engine; and where the rows of a shard stand in the parts of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from memopt.checkpoint.dynamic import dynamic8
from memopt.checkpoint.flat import FlatBlocks
from memopt.engines.bitsandbytes import BLOCK, SECOND_MOMENT
from memopt.engines.native import moment_formats
from memopt.formats import HELD, Format
from memopt.geometry import FLAT_ROW, Rows, Shape
from memopt.rules import RULES, Moment
from memopt.spec import OptimSpec

#: Every encoding that a checkpoint may hold: its tag in the manifest -> format.
CODES: dict[str, Format] = {**HELD, "dynamic8": dynamic8(BLOCK)}

#: Elements that are decoded at a time: about 10 MiB with the temporaries of encoding.
CHUNK_NUMEL = 1 << 18

MomentCodes = list[tuple[Moment, Format]]


def _native(spec: OptimSpec, h: Mapping[str, Any], name: str, shape: Shape) -> MomentCodes:
    return [(moment, fmt) for moment, fmt, _ in moment_formats(spec, h, name, Rows.whole(shape))]


def _bitsandbytes(spec: OptimSpec, h: Mapping[str, Any], name: str, shape: Shape) -> MomentCodes:
    low = spec.for_parameter(name)[0] == "8bit"
    chosen = []
    for moment in RULES[spec.rule].moments(h, shape):
        moment = moment._replace(signed=moment.name != SECOND_MOMENT)
        encoded = low and CODES["dynamic8"].declines(moment, shape) is None
        chosen.append((moment, CODES["dynamic8" if encoded else "32bit"]))
    return chosen


_BY_ENGINE: dict[str, Callable[..., MomentCodes]] = {"native": _native, "bitsandbytes": _bitsandbytes}


def moment_codes(spec: OptimSpec, h: Mapping[str, Any], name: str, shape: Shape) -> MomentCodes:
    """``(moment, format)`` for each moment of a parameter, ``signed`` being the code's sign (bitsandbytes keeps some
    non-negative moments in its signed code)."""
    return _BY_ENGINE[spec.engine](spec, h, name, shape)


def is_shared(fmt: Format, moment: Moment, shape: Shape, part: str) -> bool:
    """Whether every shard holds the whole part, as it does the column means of a matrix."""
    none, whole = Rows(shape, 0, 0), Rows.whole(shape)
    return fmt.layout(moment, none)[part].shape == fmt.layout(moment, whole)[part].shape


def span(fmt: Format, moment: Moment, part: str, outer: Rows, inner: Rows) -> tuple[int, int] | None:
    """Where the rows ``inner`` stand along dimension 0 of the part that holds the rows ``outer``; None is all of it.

    >>> span(HELD["8bit"], Moment("exp_avg"), "scales", Rows((1024,), 1, 4), Rows((1024,), 2, 3))
    (1, 2)
    """
    if inner == outer or is_shared(fmt, moment, outer.shape, part):
        return None
    if isinstance(fmt, FlatBlocks):
        return fmt.span(part, outer, inner)
    start = fmt.layout(moment, outer._replace(stop=inner.first))[part].shape[0]
    return start, start + fmt.layout(moment, inner)[part].shape[0]


def common(a: Rows, b: Rows) -> Rows | None:
    """The rows in both, or None where there are none."""
    first, stop = max(a.first, b.first), min(a.stop, b.stop)
    return a._replace(first=first, stop=stop) if first < stop else None


def stored_rows(fmt: Format, moment: Moment, rows: Rows) -> Rows:
    """What the parts for these rows really hold. Of a vector, whose rows a partition may cut within a block: single
    elements where the format keeps one number for each, the whole where every rank has all, else the rows around.

    >>> stored_rows(HELD["8bit"], Moment("exp_avg"), Rows((600,), 300, 301, 1))
    Rows(shape=(600,), first=1, stop=2, flat=256)
    """
    if len(rows.shape) >= 2:
        return rows
    whole = Rows.whole(rows.shape)
    layout = fmt.layout(moment, whole)
    if [part.shape for part in layout.values()] == [rows.shape]:
        return rows.in_units(1)
    return whole if layout == fmt.layout(moment, rows) else rows.in_units(FLAT_ROW)


def chunks(rows: Rows, numel: int = CHUNK_NUMEL) -> Iterator[Rows]:
    """These rows in pieces of about ``numel`` elements, at least one row each; all at once where they have none."""
    if not rows.numel:
        yield rows
        return
    height = max(numel // max(rows.cols, 1), 1)
    for first in range(rows.first, rows.stop, height):
        yield rows._replace(first=first, stop=min(first + height, rows.stop))
