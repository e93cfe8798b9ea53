"""Rows and columns of a parameter: the one view in which blocks, shards and random numbers are defined.

Every parameter is a matrix of rows by columns. With two dimensions or more, a row is one index of dimension 0 and
the columns are all other dimensions, flattened. A tensor of one dimension or none is cut into rows of 256 elements,
the last one ragged. Blocks never straddle rows and shards are ranges of rows, so state cut at rows is bit-identical
to the same rows of the whole: *the layout depends on the global shape only*.
"""

# Without `from __future__ import annotations`: string annotations on a NamedTuple cost a millisecond of start-up.
from math import prod
from typing import NamedTuple

#: Elements of one row of a 1-D tensor; a multiple of every format's block.
FLAT_ROW = 256

Shape = tuple[int, ...]


def row_count(shape: Shape) -> int:
    """How many rows a parameter has.

    >>> row_count((5, 3)), row_count((4097,)), row_count(()), row_count((0,))
    (5, 17, 1, 0)
    """
    return shape[0] if len(shape) >= 2 else -(-prod(shape) // FLAT_ROW)


class Rows(NamedTuple):
    """Rows ``first`` up to ``stop`` of a parameter whose global shape is ``shape``."""

    shape: Shape
    first: int
    stop: int

    @classmethod
    def whole(cls, shape: Shape) -> "Rows":
        return cls(shape, 0, row_count(shape))

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.stop - self.first

    @property
    def is_whole(self) -> bool:
        return self.count == row_count(self.shape)

    @property
    def cols(self) -> int:
        """Elements of a full row (``FLAT_ROW`` for a tensor of one dimension or none)."""
        return prod(self.shape[1:]) if len(self.shape) >= 2 else FLAT_ROW

    @property
    def bounds(self) -> tuple[int, int]:
        """The range along dimension 0 (for 0-D: of the one element) that these rows are."""
        if len(self.shape) >= 2:
            return self.first, self.stop
        n = prod(self.shape)
        return min(self.first * FLAT_ROW, n), min(self.stop * FLAT_ROW, n)

    @property
    def local_shape(self) -> Shape:
        """Shape of these rows as a tensor; the parameter's own shape when the rows are all of them."""
        if self.is_whole:
            return self.shape
        start, stop = self.bounds
        return (stop - start, *self.shape[1:]) if self.shape else (stop - start,)

    @property
    def numel(self) -> int:
        return prod(self.local_shape)

    def blocks(self, block: int) -> int:
        """Blocks in these rows: per row, ``ceil(cols / block)``; a flat tensor has no blocks past its end."""
        if len(self.shape) >= 2:
            return self.count * -(-self.cols // block)
        return -(-self.numel // block)
