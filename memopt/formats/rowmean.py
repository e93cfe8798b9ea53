"""``rowmean``: one number for each row, the mean of its elements. Asked for by a rule, not by a spec."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import FLAT_ROW, MIN_COLS, Rows, Shape, row_count
from memopt.formats.base import Format, Parts, Shard, as_blocks
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor


def _over_last(shape: Shape) -> bool:
    """Whether the mean is over the last dimension alone, or over all but the first (kernels of a convolution)."""
    return len(shape) == 2 or shape[-1] >= MIN_COLS


def span(rows: Rows) -> int:
    """Elements of a row: every so many of the flattened tensor share one number."""
    if len(rows.shape) < 2:
        return FLAT_ROW  # whatever the unit in which a vector is cut
    return rows.shape[-1] if _over_last(rows.shape) else prod(rows.shape[1:])


@final
class RowMean(Format):
    """fp32 means, 4 bytes per row: over the last dimension of a matrix and of a stack of matrices, over all but the
    first of a convolution, over each 256 elements of a vector.

    ``write`` returns the means in the parameter's shape, which is all that a step may see. Rows are whole on every
    rank, so means are cut as the parameter is and nothing is summed over ranks; but for a vector that FSDP2 cuts
    between any two elements, whose means are of the sum over the ranks and whole on every rank.
    """

    name = "rowmean"
    summary = "fp32 mean of each row"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return None

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        shape = rows.local_shape
        if len(rows.shape) < 2:
            count = row_count(rows.shape) if rows.may_cut else rows.count
            return {"": TensorSpec("float32", (count,))}
        if _over_last(rows.shape):
            return {"": TensorSpec("float32", (*shape[:-1], 1))}
        return {"": TensorSpec("float32", (shape[0], *[1] * (len(shape) - 1)))}

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        rows = shard.rows
        if len(rows.shape) < 2:
            start = rows.bounds[0] if rows.may_cut else 0
            return parts[""].repeat_interleave(FLAT_ROW)[start : start + rows.numel].reshape(rows.local_shape)
        return parts[""].expand(rows.local_shape).contiguous()

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        rows = shard.rows
        if rows.may_cut and len(rows.shape) < 2:
            mine, rows = x, Rows.whole(rows.shape)
            x = x.new_zeros(rows.numel)
            x[slice(*shard.rows.bounds)] = mine
            x = shard.total(x)
        if not x.numel():
            return x
        if len(rows.shape) < 2:
            counts = x.new_full((rows.count,), FLAT_ROW)
            counts[-1] -= rows.count * FLAT_ROW - rows.numel
            parts[""].copy_(as_blocks(x, rows, FLAT_ROW).sum((1, 2)) / counts)
        else:
            dims = (-1,) if _over_last(rows.shape) else tuple(range(1, x.dim()))
            parts[""].copy_(x.mean(dims, keepdim=True))
        return self.read(parts, moment, shard)
