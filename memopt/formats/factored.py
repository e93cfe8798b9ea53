"""``factored``: a non-negative matrix as the means of its rows and columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

#: The smallest normal fp32: a matrix of zeros is divided by this and stays zero.
TINY = 2.0**-126


@final
class Factored(Format):
    """``row`` fp32 [..., rows, 1] and ``col`` fp32 [..., 1, columns]: means over the last and the last but one
    dimension; x ≈ row * col / mean(row), the rank-1 matrix nearest in I-divergence.

    4 * (rows + columns) bytes per matrix of the last two dimensions (leading dimensions are a batch, as in
    torch.optim.Adafactor). The means of a reconstruction are the stored means, so averaging the reconstruction and
    factoring again is the published update of the factors. On a matrix cut by rows, ``row`` is cut and ``col`` is
    whole on every rank.

    Source: Shazeer & Stern, "Adafactor", ICML 2018, section 3.
    """

    name = "factored"
    whole_tensor = True
    summary = "row and column means of non-negative moments; the others in 32 bits"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        if not moment.factorable:
            return "a signed moment has no factored form" if moment.signed else "this moment has no factored form"
        return "fewer than two dimensions" if len(shape) < 2 else None

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        shape = rows.local_shape
        column = shape if len(shape) > 2 else rows.shape
        return {
            "row": TensorSpec("float32", (*shape[:-1], 1)),
            "col": TensorSpec("float32", (*column[:-2], 1, column[-1])),
        }

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        return self._product(parts, shard, TINY)

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        import torch

        if shard.rows.cols:
            parts["row"].copy_(x.mean(-1, keepdim=True, dtype=torch.float64))
        height = shard.rows.shape[-2]
        if height:
            matrix = x.dim() == 2  # of a stack, every rank has whole matrices
            column = (x[shard.counted] if matrix else x).sum(-2, keepdim=True, dtype=torch.float64)
            parts["col"].copy_((shard.total(column) if matrix else column) / height)
        return self._product(parts, shard, max(floor, TINY))

    @staticmethod
    def _product(parts: Parts, shard: Shard, floor: float) -> Tensor:
        row, col = parts["row"], parts["col"]
        if row.dim() > 2:
            mean = row.mean(-2, keepdim=True)
        else:  # rows may be elsewhere; the mean of the columns' means is the same number
            mean = col.mean(-1, keepdim=True) if col.numel() else col.new_ones(1, 1)
        return (row / mean.clamp(min=floor)) * col
