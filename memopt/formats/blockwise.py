"""Block-wise codes: a block of a row shares one fp32 scale, each element is an integer code.

Two codes, one for each kind of moment, both rounded *stochastically and without bias*: the expected value of what is
stored is what was written. Round-to-nearest would freeze a second moment at b2 = 0.999, whose relative change per
step is far below any 8-bit code's step.

*Signed* (``exp_avg``), q in -L … L:  x = sign(q) (q / L)² absmax.
A square-root code: relative step 2/q, fine at the top and five decades deep in 8 bits. Encoding takes one correctly
rounded square root, so codes are the same on every device. With y = |x| L² / absmax and q = floor(sqrt(y)), q + 1 is
chosen with probability (y - q²) / (2q + 1), compared without a division.

*Non-negative* (``exp_avg_sq``), q in 0 … T:  an unsigned float of few bits, relative to the block's maximum. Its bits
are the leading bits of the fp32 number, M of them mantissa: adding random low bits and truncating *is* unbiased
stochastic rounding. In 8 bits M = 3: steps of at most 12.5 % over 31 octaves (down to 5e-10 of the maximum); in 4 bits
M = 0: powers of two down to 6e-5. The smallest code stands for every smaller value that is not zero, so that a
denominator never underflows to zero where the numerator does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from memopt import noise
from memopt.formats.base import Shard, as_blocks, from_blocks
from memopt.geometry import Rows
from memopt.ledger import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

#: The largest fp32; reciprocals of tiny scales are clamped to it, so that zero blocks give 0 and not NaN.
FLT_MAX = 3.4028234663852886e38
EXPONENT_ONE = 127


class Code(NamedTuple):
    """Sizes of the two codes: ``levels`` is L, ``top`` is T, ``mantissa`` is M."""

    block: int
    levels: int
    top: int
    mantissa: int

    @property
    def shift(self) -> int:
        return 23 - self.mantissa

    @property
    def offset(self) -> int:
        """What is subtracted from the leading bits so that 1.0 has the code ``top``."""
        return (EXPONENT_ONE << self.mantissa) - self.top


def scales_layout(rows: Rows, block: int) -> TensorSpec:
    """fp32 [rows, blocks per row]; of a flat tensor [blocks], none past its end."""
    if len(rows.shape) >= 2:
        return TensorSpec("float32", (rows.count, -(-rows.cols // block)))
    return TensorSpec("float32", (rows.blocks(block),))


def load_scales(scales: Tensor, rows: Rows, block: int) -> Tensor:
    """The stored scales as fp32 [rows, blocks per row], zeros past the end of a flat tensor."""
    per_row = -(-rows.cols // block)
    full = scales.new_zeros(rows.count * per_row)
    full[: scales.numel()] = scales.reshape(-1)
    return full.view(rows.count, per_row)


def store_scales(values: Tensor, scales: Tensor) -> None:
    """The inverse of :func:`load_scales`."""
    scales.copy_(values.reshape(-1)[: scales.numel()].view(scales.shape))


def random_words(shard: Shard, x: Tensor) -> Tensor:
    """Random int32 words in the shape of ``x`` [rows, blocks, block]."""
    rows = shard.rows
    return noise.bits(shard.key, rows.first, rows.count, x.shape[1] * x.shape[2], x.device).view(x.shape)


def uniform(words: Tensor) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-24, from the upper bits of the words."""
    return ((words >> 8) & 0xFFFFFF).float().mul_(2.0**-24)


def reciprocal(scale: Tensor, numerator: float) -> Tensor:
    return (numerator / scale).clamp_(max=FLT_MAX)


def encode_signed(x: Tensor, code: Code, shard: Shard) -> tuple[Tensor, Tensor]:
    """fp32 [local_shape] -> integer codes fp32 [rows, blocks, block], scales fp32 [rows, blocks]."""
    x = as_blocks(x, shard.rows, code.block)
    scale = x.abs().amax(-1)
    y = x.abs().mul_(reciprocal(scale, float(code.levels**2))[..., None])
    q = y.sqrt().floor_()
    up = uniform(random_words(shard, x)).mul_(q.mul(2).add_(1)) < y.sub_(q.square())
    q = q.add_(up).clamp_(max=code.levels)
    return q.copysign_(x), scale


def decode_signed(q: Tensor, scale: Tensor, code: Code, shard: Shard) -> Tensor:
    """Codes fp32 [rows, blocks, block], scales [rows, blocks] -> fp32 [local_shape]."""
    return from_blocks(q.mul(q.abs()).mul_((scale / code.levels**2)[..., None]), shard.rows)


def encode_unsigned(x: Tensor, code: Code, shard: Shard) -> tuple[Tensor, Tensor]:
    """fp32 >= 0 [local_shape] -> codes int32 [rows, blocks, block], scales fp32 [rows, blocks]."""
    import torch

    x = as_blocks(x, shard.rows, code.block)
    scale = x.amax(-1)
    y = x.mul(reciprocal(scale, 1.0)[..., None]).clamp_(max=1.0)
    low = random_words(shard, x) & ((1 << code.shift) - 1)
    q = ((y.view(torch.int32) + low) >> code.shift).sub_(code.offset).clamp_(min=1)
    return q.mul_(x > 0), scale


def decode_unsigned(q: Tensor, scale: Tensor, code: Code, shard: Shard) -> Tensor:
    """Codes int32 [rows, blocks, block], scales [rows, blocks] -> fp32 [local_shape]."""
    import torch

    value = ((q + code.offset) << code.shift).view(torch.float32)
    return from_blocks(value.mul(scale[..., None]).mul_(q > 0), shard.rows)
