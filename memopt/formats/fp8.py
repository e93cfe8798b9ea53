"""``fp8``: torch.float8_e4m3fn with one fp32 scale per 256."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard, as_blocks, from_blocks, too_small
from memopt.formats.blockwise import (
    BELOW_ONE,
    load_scales,
    random_words,
    reciprocal,
    scales_layout,
    store_scales,
    truncate,
    uniform,
    upper_bits,
)
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 256
LARGEST = 448.0  # of e4m3fn
SMALLEST_NORMAL = 2.0**-6
QUANTUM = 2.0**-9  # step below the smallest normal number, and the smallest number
SHIFT = 20  # fp32 has 20 mantissa bits more


def rounded_in_roots(y: Tensor, u: Tensor) -> Tensor:
    """0 <= y <= LARGEST on the grid, up or down by u in [0, 1), so that the mean of the fourth root is that of y.

    In steps of the grid y is n + f, with n from 8 to 15 or, where it is subnormal, less. It goes up with

        p = f + 3 / (8 (n + f)) p (1 - p)

    which is what keeps E[y^(1/4)] but for the third order in 1/n: 0.02 % at n = 1. It is what comes of
    adding u + 3 / (8 (n + f)) u (1 - u) before the fraction is cut off.
    """
    import torch

    octave = y.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    step = octave.clamp_(min=SMALLEST_NORMAL).mul_(QUANTUM / SMALLEST_NORMAL)
    steps = y / step
    added = (1 - u).mul_(u).mul_(3 / 8).div_(steps.clamp(min=1.0)).add_(u)
    return steps.add_(added.mul_(BELOW_ONE)).floor_().mul_(step)


@final
class FP8(Format):
    """``codes`` float8_e4m3fn in the parameter's shape, ``scales`` fp32 [rows, ceil(cols / 256)], x = code * scale.

    1.016 bytes per element, readable by any tool that knows fp8. Stochastic rounding onto the e4m3 grid (relative
    step at most 12.5 % over 15 octaves below the block's maximum, absolute below): of a signed moment the expected
    value is kept, of a non-negative one that of its fourth root, as in 4 bits (:mod:`memopt.formats.blockwise`), so
    that steps are as long as those of an exact moment. A non-zero second moment is never stored as zero.
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
        if moment.signed:
            words = random_words(shard, y)
            normal = truncate(y, SHIFT, upper_bits(words, SHIFT)).view(torch.float32)
            subnormal = y.div(QUANTUM).add_(uniform(words)).floor_().mul_(QUANTUM)
            code = torch.where(y >= SMALLEST_NORMAL, normal, subnormal)
        else:
            code = rounded_in_roots(y, uniform(random_words(shard, y))).clamp_(min=QUANTUM).mul_(y > 0)
        parts["codes"].copy_(from_blocks(code.copysign_(blocks), shard.rows))
        store_scales(largest / LARGEST, parts["scales"])
        return x
