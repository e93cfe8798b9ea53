"""Which parameters are matrices to a rule of matrices, and which matrices a tensor of more dimensions is made of."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from memopt.core.hyperparameters import SpecError
from memopt.core.param_kinds import kind_of_name
from memopt.core.rows import Rows, Shape

if TYPE_CHECKING:
    from torch import Tensor

#: A tensor of three dimensions is a stack of matrices (a layer's experts) unless its last one is a kernel's, which is
#: shorter than this.
KERNEL = 64


class Matrices(NamedTuple):
    """``stack`` matrices of ``rows`` by ``cols``. ``stacked``: dimension 0 numbers them; else there is one, dimension 0
    by all others."""

    stack: int
    rows: int
    cols: int
    stacked: bool

    def of(self, x: Tensor) -> Tensor:
        """These rows of the parameter's dimension 0, whatever they are, as [stack, rows, cols]."""
        return x.reshape(-1, self.rows, self.cols) if self.stacked else x.reshape(1, -1, self.cols)

    def of_rows(self, rows: Rows) -> tuple[int, int, int]:
        """The shape of that."""
        first, stop = rows.bounds
        return (stop - first, self.rows, self.cols) if self.stacked else (1, stop - first, self.cols)


def matrices(shape: Shape) -> Matrices:
    """How a parameter of two dimensions or more is cut into matrices.

    >>> matrices((8, 64, 128)), matrices((64, 32, 3, 3))
    (Matrices(stack=8, rows=64, cols=128, stacked=True), Matrices(stack=1, rows=64, cols=288, stacked=False))
    """
    shape = shape or (1,)  # layouts are asked for of what no rule of matrices takes, too
    if len(shape) == 3 and shape[-1] >= KERNEL:
        return Matrices(*shape, stacked=True)
    return Matrices(1, shape[0], prod(shape[1:]), stacked=False)


def projection(shape: Shape, rank: int) -> tuple[Shape, bool]:
    """The shape of what is left when the shorter side of each matrix is projected to ``rank`` dimensions, or to its own
    where it has fewer; and whether that side are the rows.

    >>> projection((4096, 14336), 256), projection((14336, 4096), 256), projection((8, 64, 128), 16)
    (((256, 14336), True), ((14336, 256), False), ((8, 16, 128), True))
    """
    one = matrices(shape)
    k, wide = min(rank, one.rows, one.cols), one.rows < one.cols
    left = (k, one.cols) if wide else (one.rows, k)
    return ((one.stack, *left) if one.stacked else left), wide


def blocks(rows: int, split: int | Sequence[int] | None) -> tuple[int, ...]:
    """The heights of the matrices that a matrix of so many rows is to be, one below the other.

    >>> blocks(12, None), blocks(12, 3), blocks(12, (8, 2, 2))
    ((12,), (4, 4, 4), (8, 2, 2))
    """
    if split is None:
        return (rows,)
    found = (rows // split,) * split if isinstance(split, int) and rows % split == 0 else split
    if isinstance(found, int) or sum(found) != rows:
        what = f"{split} equal parts" if isinstance(split, int) else f"rows {tuple(split)}, which are {sum(split)}"
        raise SpecError(f"split_rows={split!r}: a matrix of {rows} rows does not split into {what}")
    return tuple(found)


def declines(name: str, shape: Shape, kind: str) -> str | None:
    """Why a parameter is no hidden matrix, or None: vectors, and by module or by name embeddings, output heads, gates
    and norms."""
    if len(shape) < 2:
        return "a vector" if shape else "a number"
    found = kind or kind_of_name(name)
    if found:
        return found
    one = matrices(shape)
    return "a vector" if min(one.rows, one.cols) < 2 else None
