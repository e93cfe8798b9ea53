"""flashoptim's 8-bit encoding, readable and writable without flashoptim.

Source: FlashOptim, Databricks 2026; ``_triton_quantize_kernel`` of flashoptim 0.1.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core.rows import Shape
from memopt.formats.foreign.flat_blocks import FlatBlocks, relative
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32


@final
class Companded(FlatBlocks):
    """``codes`` int8 (of moments that are never negative, uint8); ``scales`` fp16, the largest magnitude s of a block.

    A signed moment of code q is y / (2 - |y|) s with y = q / 127. A second moment is (q s / 255)², s being the largest
    root. Tensors of any size are encoded, as in flashoptim.

    Where flashoptim rounds a scale to the nearest fp16, and moments under 3e-8 to zero, here it is rounded up, and
    codes are of the rounded scale: the moments are as exact and none overflows. No positive second moment is stored as
    zero: with a first moment that is not, the next step would be out of all proportion.
    """

    name = "flashoptim 8bit"
    summary = "flashoptim's companded codes, flat blocks of 32"
    scale_dtype = "float16"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return None

    def codes_dtype(self, moment: Moment) -> str:
        return "int8" if moment.signed else "uint8"

    def decode(self, codes: Tensor, scales: Tensor, moment: Moment) -> Tensor:
        if not moment.signed:
            return codes.float().div_(255).mul_(scales).square_()
        y = codes.float().div_(127)
        return y.div_(2 - y.abs()).mul_(scales)

    def encode(self, blocks: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        import torch

        x = blocks if moment.signed else blocks.sqrt()
        scales = _up(x.abs().amax(-1))
        y = relative(x, scales.float()).clamp_(-1, 1)
        if moment.signed:
            return (y * 2).div_(1 + y.abs()).mul_(127).round_().to(torch.int8), scales
        return torch.where(x > 0, (y * 255).round_().clamp_(min=1), y).to(torch.uint8), scales


def _up(x: Tensor) -> Tensor:
    """The smallest fp16 numbers that are not under ``x`` >= 0; at most the largest there is."""
    import torch

    near = x.clamp(max=torch.finfo(torch.float16).max).half()
    return (near.view(torch.int16) + (near.float() < x) * near.isfinite()).to(torch.int16).view(torch.float16)
