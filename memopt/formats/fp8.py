"""``fp8``: torch.float8_e4m3fn with one fp32 scale per 256."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard, as_blocks, from_blocks, too_small
from memopt.formats.blockwise import (
    load_scales,
    random_words,
    reciprocal,
    scales_layout,
    store_scales,
    truncate,
    uniform,
)
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 256
LARGEST = 448.0  # of e4m3fn
SMALLEST_NORMAL = 2.0**-6
QUANTUM = 2.0**-9  # step below the smallest normal number, and the smallest number
SHIFT = 20  # fp32 has 20 mantissa bits more


@final
class FP8(Format):
    """``codes`` float8_e4m3fn in the parameter's shape, ``scales`` fp32 [rows, ceil(cols / 256)], x = code * scale.

    1.016 bytes per element, readable by any tool that knows fp8. Stochastic rounding onto the e4m3 grid (relative
    step at most 12.5 % over 15 octaves below the block's maximum, absolute below). A non-zero second moment is never
    stored as zero.
    """

    name = "fp8"
    summary = "float8_e4m3fn in blocks of 256, 1.02 bytes per element"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return too_small(shape)

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        return {"codes": TensorSpec("float8_e4m3fn", rows.local_shape), "scales": scales_layout(rows, BLOCK)}

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        codes = as_blocks(parts["codes"].float(), shard.rows, BLOCK)
        return from_blocks(codes.mul_(load_scales(parts["scales"], shard.rows, BLOCK)[..., None]), shard.rows)

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        import torch

        blocks = as_blocks(x, shard.rows, BLOCK)
        largest = blocks.abs().amax(-1)
        y = blocks.abs().mul_(reciprocal(largest, LARGEST)[..., None]).clamp_(max=LARGEST)
        words = random_words(shard, y)
        normal = truncate(y, SHIFT, words).view(torch.float32)
        subnormal = y.div(QUANTUM).add_(uniform(words)).floor_().mul_(QUANTUM)
        code = torch.where(y >= SMALLEST_NORMAL, normal, subnormal)
        if not moment.signed:
            code = code.clamp_(min=QUANTUM).mul_(y > 0)
        parts["codes"].copy_(from_blocks(code.copysign_(blocks), shard.rows))
        store_scales(largest / LARGEST, parts["scales"])
        return x
