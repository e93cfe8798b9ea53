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


def row_count(shape: Shape, flat: int = FLAT_ROW) -> int:
    """How many rows a parameter has.

    >>> row_count((5, 3)), row_count((4097,)), row_count(()), row_count((0,))
    (5, 17, 1, 0)
    """
    return shape[0] if len(shape) >= 2 else -(-prod(shape) // flat)


class Rows(NamedTuple):
    """Rows ``first`` up to ``stop`` of a parameter whose global shape is ``shape``.

    ``flat`` is the length of a row of a tensor of one dimension or none: ``FLAT_ROW``, or 1 where a partition cuts
    between any two elements (such tensors are kept in 32 bits, see ``Partition.declines``).
    """

    shape: Shape
    first: int
    stop: int
    flat: int = FLAT_ROW

    @classmethod
    def whole(cls, shape: Shape) -> "Rows":
        return cls(shape, 0, row_count(shape))

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.stop - self.first

    @property
    def is_whole(self) -> bool:
        shape = self.shape
        return self.stop - self.first == (shape[0] if len(shape) >= 2 else row_count(shape, self.flat))

    @property
    def cols(self) -> int:
        """Elements of a full row (``flat`` for a tensor of one dimension or none)."""
        return prod(self.shape[1:]) if len(self.shape) >= 2 else self.flat

    @property
    def bounds(self) -> tuple[int, int]:
        """The range along dimension 0 (for 0-D: of the one element) that these rows are."""
        if len(self.shape) >= 2:
            return self.first, self.stop
        n = prod(self.shape)
        return min(self.first * self.flat, n), min(self.stop * self.flat, n)

    def in_units(self, flat: int) -> "Rows":
        """The fewest rows of this length that contain these; of a matrix, these.

        >>> Rows((600,), 300, 600, 1).in_units(256)
        Rows(shape=(600,), first=1, stop=3, flat=256)
        """
        if flat == self.flat or len(self.shape) >= 2:
            return self
        start, stop = self.bounds
        return Rows(self.shape, start // flat, -(-stop // flat), flat)

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
