"""Rows and columns of a parameter: the one view in which blocks, shards and random numbers are defined.

Every parameter is a matrix of rows by columns. With two dimensions or more, a row is one index of dimension 0 and
the columns are all other dimensions, flattened. Where these are few (LoRA's B, a depthwise convolution), a row is as
many indices as make up to 256 elements; a tensor of one dimension or none is cut into rows of 256 elements. The last
row of both may be ragged. Blocks never straddle rows and shards are ranges of rows, so state cut at rows is
bit-identical to the same rows of the whole: *the layout depends on the global shape only*.
"""

# Without `from __future__ import annotations`: string annotations on a NamedTuple cost a millisecond of start-up.
from functools import lru_cache
from math import prod
from typing import NamedTuple

#: Elements of one row of a 1-D tensor, and at most of several narrow rows together; a multiple of every format's block.
FLAT_ROW = 256
#: Of fewer elements are the rows of a matrix that are taken together, and the tensors whose rows are not: these stay
#: in 32 bits (bitsandbytes and torchao use the same 4096).
MIN_COLS = 64
MIN_NUMEL = 4096

Shape = tuple[int, ...]


@lru_cache(4096)
def row_count(shape: Shape, flat: int = FLAT_ROW) -> int:
    """How many rows a parameter has.

    >>> row_count((5, 3)), row_count((4097,)), row_count(()), row_count((0,)), row_count((4096, 16))
    (5, 17, 1, 0, 256)
    """
    return -(-(shape[0] if len(shape) >= 2 else prod(shape)) // indices_of_row(shape, flat))


@lru_cache(4096)
def indices_of_row(shape: Shape, flat: int = FLAT_ROW) -> int:
    """Indices of dimension 0 in one row: an even number where an index has an odd number of elements, for codes that
    lie two in a byte.

    >>> indices_of_row((4096, 16)), indices_of_row((4096, 9)), indices_of_row((4096, 64)), indices_of_row((9, 9))
    (16, 28, 1, 1)
    """
    if len(shape) < 2:
        return flat
    cols = prod(shape[1:])
    if not 0 < cols < MIN_COLS or cols * shape[0] < MIN_NUMEL:
        return 1
    together = flat // cols
    return max(together - (cols & together & 1), 1)


def is_narrow(shape: Shape) -> bool:
    """Whether several indices of dimension 0 of a matrix are one row.

    >>> is_narrow((4096, 16)), is_narrow((4096, 64)), is_narrow((4096,))
    (True, False, False)
    """
    return len(shape) >= 2 and indices_of_row(shape) > 1


class Rows(NamedTuple):
    """Rows ``first`` up to ``stop`` of a parameter whose global shape is ``shape``.

    ``flat`` is the length of a row of a tensor of one dimension or none, and at most that of narrow rows together:
    ``FLAT_ROW``, or 1 where a partition cuts between any two indices of dimension 0 (such tensors are kept in 32 bits,
    see ``Partition.declines``).
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
        return self.stop - self.first == row_count(self.shape, self.flat)

    @property
    def unit(self) -> int:
        """Indices of dimension 0 in one row."""
        return indices_of_row(self.shape, self.flat)

    @property
    def may_cut(self) -> bool:
        """Whether these are so short because a partition may cut within a row of the usual length."""
        return self.unit != indices_of_row(self.shape)

    @property
    def cols(self) -> int:
        """Elements of a full row."""
        return self.unit * prod(self.shape[1:])

    @property
    def bounds(self) -> tuple[int, int]:
        """The range along dimension 0 (for 0-D: of the one element) that these rows are."""
        unit, n = self.unit, self.shape[0] if self.shape else 1
        return min(self.first * unit, n), min(self.stop * unit, n)

    def in_units(self, flat: int) -> "Rows":
        """The fewest rows of this length that contain these; of a matrix with long rows, these.

        >>> Rows((600,), 300, 600, 1).in_units(256), Rows((4096, 16), 2, 3).in_units(1)
        (Rows(shape=(600,), first=1, stop=3, flat=256), Rows(shape=(4096, 16), first=32, stop=48, flat=1))
        """
        unit = indices_of_row(self.shape, flat)
        if unit == self.unit:
            return self
        start, stop = self.bounds
        return Rows(self.shape, start // unit, -(-stop // unit), flat)

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
