"""``32bit``: the moment as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor


@final
class FP32(Format):
    """One fp32 tensor in the parameter's shape, 4 bytes per element, exact.

    ``read`` is the tensor itself, so an update in place is the write.
    """

    name = "32bit"
    summary = "fp32, 4 bytes per element; exact"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return None

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        return {"": TensorSpec("float32", rows.local_shape)}

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        return parts[""]

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        if x is not parts[""]:
            parts[""].copy_(x)
        return x
