"""The format of what is of a random projection of a parameter's matrices. Asked for by ``Moment.rank``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.registry import ALL_FORMATS
from memopt.core.rows import MIN_COLS, Rows, Shape
from memopt.formats.base import Format, Parts, Shard
from memopt.rules.base import Moment
from memopt.rules.matrices import matrices, projection

if TYPE_CHECKING:
    from torch import Tensor

_TAG = re.compile(r"rank([1-9][0-9]{0,5})-([a-z0-9]+)")


def projected_rows(rows: Rows, rank: int) -> Rows:
    """Where these rows of a parameter stand in its projection, as rows of that: all of it, for everyone, where rows are
    what is projected; else the same rows. Rows of one index each, however short."""
    shape, wide = projection(rows.shape, rank)
    if wide and not matrices(rows.shape).stacked:
        return Rows(shape, 0, shape[0], 1)
    return Rows(shape, *rows.bounds, 1)


@final
class Projected(Format):
    """The format ``inner`` of the projection to ``rank`` dimensions, in its shape: ``read`` and ``write`` are of that,
    [rank, columns] of a matrix that is wider than high, [rows here, rank] of one that is not, [matrices here, …] of a
    stack. The first is whole on every rank, the others are cut as the parameter is."""

    own_shape = True

    def __init__(self, rank: int, inner: str) -> None:
        self.rank = rank
        self.inner: Format = ALL_FORMATS[inner]
        self.name = f"rank{rank}-{inner}"  # type: ignore[misc]
        self.summary = f"{self.inner.summary}; of a projection to {rank} dimensions"  # type: ignore[misc]

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        own, _ = projection(shape, self.rank)
        if self.inner.name != "32bit" and prod(own[1:]) < MIN_COLS:
            return f"a projection whose rows have {prod(own[1:])} elements"
        return self.inner.declines(moment, own)

    def of_shape(self, shape: Shape) -> Shape:
        return projection(shape, self.rank)[0]

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        return self.inner.layout(moment, projected_rows(rows, self.rank))

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        return self.inner.read(parts, moment, self._own(shard))

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        return self.inner.write(x, parts, moment, self._own(shard), floor)

    def _own(self, shard: Shard) -> Shard:
        return shard._replace(rows=projected_rows(shard.rows, self.rank))


@lru_cache(maxsize=256)
def projected(rank: int, inner: str) -> Projected:
    """One object for each rank and format."""
    return Projected(rank, inner)


def of_projection(fmt: Format, moment: Moment, shape: Shape) -> tuple[Format, str]:
    """The format of a moment that is kept of a projection of matrices of this shape, and why it is not ``fmt``."""
    found = projected(moment.rank, fmt.name)
    reason = found.declines(moment, shape)
    return (projected(moment.rank, "32bit"), reason) if reason else (found, "")


class Tags(Mapping[str, Format]):
    """Formats by the names under which a checkpoint has them: ``plain`` ones, and those of projections."""

    def __init__(self, plain: Mapping[str, Format]) -> None:
        self._plain = plain

    def __getitem__(self, tag: str) -> Format:
        found = _TAG.fullmatch(tag)
        if found and found[2] in self._plain:
            return projected(int(found[1]), found[2])
        return self._plain[tag]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)
