"""Block-wise codes: a block of a row shares one fp32 scale, each element is an integer code.

Two codes, one for each kind of moment, both rounded *stochastically* with the dither of :mod:`memopt.core.dither`.
Round-to-nearest would freeze a second moment at b2 = 0.999, whose relative change per step is far below any 8-bit
code's step.

*Signed* (``exp_avg``), q in -L … L:  x = sign(q) (q / L)² absmax.
A square-root code: relative step 2/q, fine at the top and five decades deep in 8 bits. Encoding takes one square root,
so codes are the same on every device but where a tie falls otherwise. With y = |x| L² / absmax and q = floor(sqrt(y)),
q + 1 is chosen with probability (y - q²) / (2q + 1), compared without a division: the expected value is x.

*Non-negative* (``exp_avg_sq``), q in 1 … T, and 0 for zero alone: a code of roots,

    x = s ((q + c) / (n + c))^p max        q <= n

In 8 bits p = 4, c = 0, s = 1/2 and n = 191; the 64 codes above are even steps from half of the maximum to all of it.
Most second moments are near the largest of their block, where steps are fine: 0.8 to 1.6 % in the upper half, 4 % at a
tenth, 12 % at a thousandth of the maximum, and so on down to 4e-10 of it. In 4 bits p = 8, c = 6, s = 1 and n = T = 15:
the next code is 1.5 times as large at the top and 2.9 times at the bottom, 1.5e-4 of the maximum. The smallest code
stands for every smaller value that is not zero, so that a denominator never underflows to zero where the numerator
does not.

q + 1 is chosen with the probability by which the p-th root is beyond that of q: the expected value of x^(1/p) is kept,
not that of x. A step divides by sqrt(x), whose mean is too large where the mean of x is right and x scatters, and a
moment that decays on a schedule decays too fast, by half a code's step. A walk in a high root is nearly one in log x,
and takes as long as the truth. Encoding is two or three square roots. In fp8, whose codes are 7 to
12 % apart, the mean of the fourth root is kept (``fp8.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from memopt.core import dither
from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows
from memopt.formats.base import Shard, as_blocks, from_blocks

if TYPE_CHECKING:
    from torch import Tensor

#: The largest fp32; reciprocals of tiny scales are clamped to it, so that zero blocks give 0 and not NaN.
FLT_MAX = 3.4028234663852886e38
#: What a uniform number is multiplied by, so that with a rounded sum a value that is a code stays it.
BELOW_ONE = 1 - 2.0**-20
BELOW_ONE_OF_CODES = 1 - 2.0**-16  # sums up to 256 have steps of 2^-16


class Code(NamedTuple):
    """Sizes of the two codes: ``levels`` is L, ``top`` is T, ``offset`` is c, ``halvings`` is log2 p, and ``even`` the
    number of codes that are even steps from half of the maximum to all of it."""

    block: int
    levels: int
    top: int
    halvings: int
    offset: int = 0
    even: int = 0

    @property
    def rooted(self) -> int:
        """n, the largest code of a root."""
        return self.top - self.even

    @property
    def share(self) -> float:
        """s, what n stands for."""
        return 0.5 if self.even else 1.0

    @property
    def unit(self) -> float:
        """(q + c)^p times this is x, of a maximum of 1."""
        return float(self.share / (self.rooted + self.offset) ** 2**self.halvings)

    @property
    def per_root(self) -> float:
        """x^(1/p) times this is q + c."""
        return float((self.rooted + self.offset) / self.share**0.5**self.halvings)


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
    """The dither's int32 words in the shape of ``x`` [rows, blocks, block]."""
    rows, cols = shard.rows, x.shape[1] * x.shape[2]
    return dither.bits(shard.key, shard.step, rows.first, rows.count, cols, x.device).view(x.shape)


def upper_bits(words: Tensor, count: int) -> Tensor:
    """The upper ``count`` bits of the words, as non-negative int32."""
    return (words >> (32 - count)) & ((1 << count) - 1)


def uniform(words: Tensor) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-24, from the upper bits of the words."""
    return upper_bits(words, 24).float().mul_(2.0**-24)


def reciprocal(scale: Tensor, numerator: float) -> Tensor:
    return (numerator / scale).clamp_(max=FLT_MAX)


def truncate(y: Tensor, shift: int, words: Tensor) -> Tensor:
    """The bits of fp32 ``y`` >= 0 rounded to a multiple of 2^shift, stochastically by ``words``; int32."""
    import torch

    return ((y.view(torch.int32) + upper_bits(words, shift)) >> shift) << shift


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
    place = y.sqrt()
    for _ in range(code.halvings - 1):
        place.sqrt_()
    place.mul_(code.per_root).sub_(code.offset)
    if code.even:
        place = torch.where(y < code.share, place, y.mul_(2 * code.even).add_(code.rooted - code.even))
    q = place.add_(uniform(random_words(shard, x)).mul_(BELOW_ONE_OF_CODES)).int()
    return q.clamp_(min=1, max=code.top).mul_(x > 0), scale


def decode_unsigned(q: Tensor, scale: Tensor, code: Code, shard: Shard) -> Tensor:
    """Codes int32 [rows, blocks, block], scales [rows, blocks] -> fp32 [local_shape]."""
    import torch

    value = q.add(code.offset).float()
    for _ in range(code.halvings):
        value.square_()
    value.mul_(code.unit)
    if code.even:
        value = torch.where(q <= code.rooted, value, (q - (code.rooted - code.even)) / (2.0 * code.even))
    return from_blocks(value.mul_(scale[..., None]).mul_(q > 0), shard.rows)
