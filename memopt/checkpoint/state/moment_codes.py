"""Which format holds which moment, for every engine; and where the rows of a shard stand in the parts of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from memopt.core.rows import FLAT_ROW, Rows, Shape
from memopt.engines.bitsandbytes import BLOCK
from memopt.formats import ALL_FORMATS, Format
from memopt.formats.foreign.bitsandbytes import dynamic8
from memopt.formats.projected import Tags
from memopt.layout.param import moments_of
from memopt.rules import Moment
from memopt.spec import OptimSpec

#: Every encoding that a checkpoint may hold: its tag in the manifest -> format.
CODES: Mapping[str, Format] = Tags({**ALL_FORMATS, "dynamic8": dynamic8(BLOCK)})

#: Elements that are decoded at a time: about 10 MiB with the temporaries of encoding.
CHUNK_NUMEL = 1 << 18

MomentCodes = list[tuple[Moment, Format]]


def moment_codes(spec: OptimSpec, h: Mapping[str, Any], name: str, shape: Shape) -> MomentCodes:
    """``(moment, format)`` for each moment of a parameter, ``signed`` being the code's sign (bitsandbytes keeps some
    non-negative moments in its signed code)."""
    return [(m.moment, m.format) for m in moments_of(spec, h, name, Rows.whole(shape))]


def common(a: Rows, b: Rows) -> Rows | None:
    """The rows in both, or None where there are none."""
    first, stop = max(a.first, b.first), min(a.stop, b.stop)
    return a._replace(first=first, stop=stop) if first < stop else None


@lru_cache(4096)
def stored_rows(fmt: Format, moment: Moment, rows: Rows) -> Rows:
    """What the parts for these rows really hold, where a partition may cut within a row. Of a vector single elements
    where the format keeps one number for each or for some, the whole where every rank has all, else the rows around;
    of narrow rows each, or the rows around where the format goes by several together.

    >>> stored_rows(ALL_FORMATS["8bit"], Moment("exp_avg"), Rows((600,), 300, 301, 1))
    Rows(shape=(600,), first=1, stop=2, flat=256)
    """
    whole = Rows.whole(rows.shape)
    if len(rows.shape) >= 2:
        together = fmt.layout(moment, whole) != fmt.layout(moment, whole.in_units(1))
        return rows.in_units(FLAT_ROW if together else 1)
    layout = fmt.layout(moment, whole)
    if [part.shape for part in layout.values()] == [rows.shape] or fmt.name == "sliced":
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
