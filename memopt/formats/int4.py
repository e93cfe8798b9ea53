"""``4bit``: half a byte per element, one fp32 scale per 128.

Signed moments have the code of :mod:`memopt.formats.blockwise`. Those of non-negative ones are powers of two, from the
block's maximum down to 6e-5 of it: the bits of an fp32 number before its mantissa. The smallest code stands for every
smaller value that is not zero, so that a denominator never underflows to zero where the numerator does not.

The expected value of x alone is not what a step wants. It divides by sqrt(x), whose mean a scatter of a factor of two
makes 15 % too large, and a moment that decays would be 39 % too fast. So the expected value of x^(1/4) is kept: between
2^k and 2^(k+1), at 2^k (1 + f), the next code has the probability

    ((1 + f)^(1/4) - 1) / (2^(1/4) - 1)

which is that of a walk in log x to 2 %: codes last as long as they should, and steps are as long as those of an exact
moment to a few percent. It is u >= 1 - that, and so f + a(u) >= 1 with a(u) = 2 - (1 + (1 - u) (2^(1/4) - 1))^4.
In fp8, whose codes are 7 to 12 % apart, the same is done (``fp8.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard, as_blocks, as_rows, from_blocks, too_small
from memopt.formats.blockwise import (
    BELOW_ONE,
    EXPONENT_ONE,
    Code,
    decode_signed,
    encode_signed,
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

CODE = Code(block=128, levels=7)
TOP = 15
SHIFT = 23
#: What is subtracted from the exponent so that 1.0 has the code ``TOP``.
OFFSET = EXPONENT_ONE - TOP
#: a(u) above is 2 - (ROOT - u SLOPE)^4. The root is a little less than it is, so that no rounding makes a(0) negative.
ROOT = 2.0**0.25 * (1 - 2.0**-22)
SLOPE = ROOT - 1


def added_in_roots(words: Tensor) -> Tensor:
    """2^23 a(u), int32."""
    h = uniform(words).mul_(-SLOPE).add_(ROOT).square_().square_()
    return h.sub_(2).mul_(-(2.0**SHIFT) * BELOW_ONE).int()


def encode_powers(x: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """fp32 >= 0 [local_shape] -> codes int32 [rows, blocks, block], scales fp32 [rows, blocks]."""
    x = as_blocks(x, shard.rows, CODE.block)
    scale = x.amax(-1)
    y = x.mul(reciprocal(scale, 1.0)[..., None]).clamp_(max=1.0)
    q = truncate(y, SHIFT, added_in_roots(random_words(shard, x)))
    q = (q >> SHIFT).sub_(OFFSET).clamp_(min=1)
    return q.mul_(x != 0), scale


def decode_powers(q: Tensor, scale: Tensor, shard: Shard) -> Tensor:
    """Codes int32 [rows, blocks, block], scales [rows, blocks] -> fp32 [local_shape]."""
    import torch

    value = ((q + OFFSET) << SHIFT).view(torch.float32).mul(scale[..., None])
    return from_blocks(value.where(q > 0, torch.zeros_like(value)), shard.rows)


@final
class Int4(Format):
    """``codes`` uint8 [rows, ceil(cols / 2)], two codes per byte, the even column in the low half;
    ``scales`` fp32 [rows, ceil(cols / 128)]. Signed codes are two's complement.

    0.531 bytes per element. A single second moment is off by
    up to a factor of two, right on average.
    """

    name = "4bit"
    summary = "4-bit codes in blocks of 128, 0.53 bytes per element"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return too_small(shape)

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        if len(rows.shape) >= 2:
            packed: Shape = (rows.count, -(-rows.cols // 2))
        else:
            packed = (-(-rows.numel // 2),)
        return {"codes": TensorSpec("uint8", packed), "scales": scales_layout(rows, CODE.block)}

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        import torch

        packed = parts["codes"].int()
        low, high = packed & 15, packed >> 4
        width = packed.shape[-1] * 2  # an odd width leaves half a byte over
        q = torch.stack((low, high), -1).view(_lines(shard.rows), width)[:, : _width(shard.rows)]
        q = as_blocks(q, shard.rows, CODE.block)
        scale = load_scales(parts["scales"], shard.rows, CODE.block)
        if moment.signed:
            return decode_signed(((q << 28) >> 28).float(), scale, CODE, shard)
        return decode_powers(q, scale, shard)

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        q, scale = encode_signed(x, CODE, shard) if moment.signed else encode_powers(x, shard)
        rows = shard.rows
        flat = len(rows.shape) < 2
        codes = (from_blocks(q, rows).reshape(1, rows.numel) if flat else as_rows(q, rows)).int() & 15
        even, odd = codes[..., 0::2], codes[..., 1::2]
        packed = even.clone()
        packed[..., : odd.shape[-1]] |= odd << 4
        parts["codes"].copy_(packed.view(parts["codes"].shape))
        store_scales(scale, parts["scales"])
        return x


def _lines(rows: Rows) -> int:
    """Packed lines: rows of a matrix, one for a flat tensor."""
    return rows.count if len(rows.shape) >= 2 else 1


def _width(rows: Rows) -> int:
    """Elements of one packed line: a row's columns, or all of a flat tensor."""
    return rows.cols if len(rows.shape) >= 2 else rows.numel
