"""``bf16``: the upper half of fp32, stochastically rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core import dither
from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard, too_small
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor


@final
class BF16(Format):
    """One bf16 tensor in the parameter's shape, 2 bytes per element.

    Random low bits are added to the fp32 number and its lower half is cut off: unbiased, relative step 2^-7. Rounded
    to nearest a second moment in bf16 would freeze at b2 = 0.999 (torch.optim.AdamW on bf16 parameters does).
    """

    name = "bf16"
    summary = "bf16 with stochastic rounding, 2 bytes per element"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return too_small(shape)

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        return {"": TensorSpec("bfloat16", rows.local_shape)}

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        return parts[""].float()

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        import torch

        rows = shard.rows
        words = dither.bits(shard.key, shard.step, rows.first, rows.count, rows.cols, x.device)
        low = (words.view(-1)[: x.numel()].view(x.shape) >> 16) & 0xFFFF
        rounded = (x.contiguous().view(torch.int32) + low) & -0x10000
        # A card's NaN has all bits set: with anything added it would be -0.
        parts[""].copy_(torch.where(x.isnan(), x, rounded.view(torch.float32)))
        return x
