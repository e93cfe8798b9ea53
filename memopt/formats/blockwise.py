"""Block-wise codes: a block of a row shares one fp32 scale, each element is an integer code.

Two codes, one for each kind of moment, both rounded *stochastically* with the dither of :mod:`memopt.core.dither`.
Round-to-nearest would freeze a second moment at b2 = 0.999, whose relative change per step is far below any 8-bit
code's step.

*Signed* (``exp_avg``), q in -L … L:  x = sign(q) (q / L)² absmax.
A square-root code: relative step 2/q, fine at the top and five decades deep in 8 bits. Encoding takes one correctly
rounded square root, so codes are the same on every device. With y = |x| L² / absmax and q = floor(sqrt(y)), q + 1 is
chosen with probability (y - q²) / (2q + 1), compared without a division: the expected value is x.

*Non-negative* (``exp_avg_sq``), q in 0 … T:  an unsigned float of few bits, relative to the block's maximum: the
leading bits of the fp32 number, M of them mantissa. In 8 bits M = 4: steps of at most 6.25 % over 16 octaves (down to
1.7e-5 of the maximum); in 4 bits M = 0: powers of two down to 6e-5. The smallest code stands for every smaller value
that is not zero, so that a denominator never underflows to zero where the numerator does not.

In 8 bits a uniform number of as many bits as are cut off is added to them, which moves on to the next code with the
probability f that they stand for (of [0, 1)): the expected value is x. A moment that decays then does so too fast, by
2.2 %: one that shrinks by a fraction d of itself per step goes down a code every g/d steps, g being the
relative gap to the next code, and after n = 2^M codes, an octave, it has taken (1/(n + 1) + … + 1/(2n)) / d steps where
the truth takes ln 2 / d. A second moment of b2 = 0.999 is as if of 0.99898, which is left as it is.

In 4 bits, where codes are powers of two, the expected value of x alone is not what a step wants. It divides by sqrt(x),
whose mean a scatter of a factor of two makes 15 % too large, and a moment that decays would be 39 % too fast. There the
expected value of x^(1/4) is kept: between 2^k and 2^(k+1) the next code has the probability

    ((1 + f)^(1/4) - 1) / (2^(1/4) - 1)

which is that of a walk in log x to 2 %: codes last as long as they should, and steps are as long as those of an exact
moment to a few percent. It is u >= 1 - that, and so f + a(u) >= 1 with a(u) = 2 - (1 + (1 - u) (2^(1/4) - 1))^4.
In fp8, whose codes are 7 to 12 % apart, the same is done (``fp8.py``).
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
EXPONENT_ONE = 127


#: a(u) above is 2 - (ROOT - u SLOPE)^4. The root is a little less than it is, so that no rounding makes a(0) negative,
#: and what is added stays under 1 by the third number: a value that is a code stays it.
ROOT = 2.0**0.25 * (1 - 2.0**-22)
SLOPE = ROOT - 1
BELOW_ONE = 1 - 2.0**-20


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


def truncate(y: Tensor, shift: int, words: Tensor, in_roots: bool = False) -> Tensor:
    """The bits of fp32 ``y`` >= 0 rounded to a multiple of 2^shift, stochastically by ``words``, so that the expected
    value is y or, ``in_roots``, its fourth root's is; int32."""
    import torch

    if in_roots:
        h = uniform(words).mul_(-SLOPE).add_(ROOT).square_().square_()
        added = h.sub_(2).mul_(-(2.0**shift) * BELOW_ONE).int()
    else:
        added = upper_bits(words, shift)
    return ((y.view(torch.int32) + added) >> shift) << shift


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

    x = as_blocks(x, shard.rows, code.block)
    scale = x.amax(-1)
    y = x.mul(reciprocal(scale, 1.0)[..., None]).clamp_(max=1.0)
    q = truncate(y, code.shift, random_words(shard, x), in_roots=not code.mantissa)
    q = (q >> code.shift).sub_(code.offset).clamp_(min=1)
    return q.mul_(x > 0), scale


def decode_unsigned(q: Tensor, scale: Tensor, code: Code, shard: Shard) -> Tensor:
    """Codes int32 [rows, blocks, block], scales [rows, blocks] -> fp32 [local_shape]."""
    import torch

    value = ((q + code.offset) << code.shift).view(torch.float32)
    return from_blocks(value.mul(scale[..., None]).mul_(q > 0), shard.rows)
