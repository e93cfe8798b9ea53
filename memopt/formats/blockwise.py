"""Block-wise codes: a block of a row shares one fp32 scale, each element is an integer code.

Codes are rounded *stochastically* with the dither of :mod:`memopt.core.dither`: round-to-nearest would freeze a second
moment at b2 = 0.999, whose relative change per step is far below any 8-bit code's step. Non-negative moments have a
code of their own in each format (``int8.py``, ``int4.py``); here is that of signed ones, and what all share.

*Signed* (``exp_avg``), q in -L … L:  x = sign(q) (q / L)² absmax.
A square-root code: relative step 2/q, fine at the top and five decades deep in 8 bits. Encoding takes one correctly
rounded square root, so codes are the same on every device. With y = |x| L² / absmax and q = floor(sqrt(y)), q + 1 is
chosen with probability (y - q²) / (2q + 1), compared without a division: the expected value is x.

Where the expected value of x is kept, a moment that decays does so too fast: one that shrinks by a fraction d of itself
per step goes down a code every g/d steps, g being the relative gap to the next code, and after n codes, an octave, it
has taken (1/(n + 1) + … + 1/(2n)) / d steps where the truth takes ln 2 / d: 4 % less at n = 8, 0.4 % at 64.
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
#: What is added before a fraction is cut off stays under 1 by this, where it is rounded: a value that is a code stays.
BELOW_ONE = 1 - 2.0**-20


class Code(NamedTuple):
    """Sizes of the code of signed moments: ``levels`` is L."""

    block: int
    levels: int


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


def truncate(y: Tensor, shift: int, added: Tensor) -> Tensor:
    """The bits of fp32 ``y`` >= 0 rounded to a multiple of 2^shift: up where they and ``added``, 0 … 2^shift - 1, are
    one more; int32."""
    import torch

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
