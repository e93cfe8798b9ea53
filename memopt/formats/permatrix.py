"""``permatrix``: one number for each matrix. Asked for by a rule, not by a spec."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard
from memopt.rules.base import Moment
from memopt.rules.matrices import matrices

if TYPE_CHECKING:
    from torch import Tensor


@final
class PerMatrix(Format):
    """fp32, 4 bytes for each matrix, [matrices here, 1, 1]: of a stack those of the matrices that are here, else one,
    which every rank that has some rows keeps. ``read`` and ``write`` are of that shape."""

    name = "permatrix"
    own_shape = True
    summary = "fp32, one number for each matrix"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return None

    def of_shape(self, shape: Shape) -> Shape:
        return matrices(shape).stack, 1, 1

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        count = matrices(rows.shape).of_rows(rows)[0]
        return {"": TensorSpec("float32", (count, 1, 1))}

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        return parts[""].clone()

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        parts[""].copy_(x)
        return x
