"""``8bit``: one byte per element, one fp32 scale per 256.

Signed moments have the code of :mod:`memopt.formats.blockwise`. Non-negative ones have a tapered one, with close codes
where most of a block is, near its largest, and fewer for each octave further down. Let

    z = 1 1/8 + the octaves from x up to the block's maximum,

counted as the bits of an fp32 number count them, evenly within each octave. q falls from 255 by 64 for each doubling of
z, again as the bits of an fp32 number count: the logarithm of a logarithm, in two subtractions and a conversion. 60
codes are for the upper half, 32 and 30 for the next two octaves, 16 for each of the next four, then 8 and, at the
bottom, 4: steps of 0.8 to 1.4 % from the maximum down to 0.56 of it, of 6 to 12 % at a thousandth. Code 1, 1.2e-5 of
it, stands for every smaller value down to 2^-125 of it, so that a denominator never underflows to zero where the
numerator does not.

Between two codes the value is even in what is cut off of q's bits, so a uniform number of as many bits is added to
them: the expected value is x. A moment that decays does so too fast, as :mod:`memopt.formats.blockwise` says of codes
whose mean is kept, by 0.5 % in the upper half and 4 % where there are 8 codes for an octave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard, as_blocks, from_blocks, too_small
from memopt.formats.blockwise import (
    EXPONENT_ONE,
    Code,
    decode_signed,
    encode_signed,
    load_scales,
    random_words,
    reciprocal,
    scales_layout,
    store_scales,
    upper_bits,
)
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

CODE = Code(block=256, levels=127)
TOP = 255
#: Of the bits of z, an fp32 number, all but 6 of its mantissa are cut off.
SHIFT = 23 - 6
#: z of the block's maximum, in units of 2^-23 of an octave: the bits of y and z add up to ``SUM``.
FIRST = 9 << 20
SUM = (EXPONENT_ONE << 23) + FIRST
#: The bits of ``FIRST`` as an fp32 number, and those of all codes: what is cut off is the difference to the bits of z.
PLACES = ((EXPONENT_ONE + 23) << 23) + (1 << 20) + (TOP << SHIFT)
#: The bits of what code 1 stands for; it does so for all from ``NOTHING`` on.
LEAST = 0x37500000
NOTHING = 2.0**-125


def encode_tapered(x: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """fp32 >= 0 [local_shape] -> codes int32 [rows, blocks, block], scales fp32 [rows, blocks]."""
    import torch

    x = as_blocks(x, shard.rows, CODE.block)
    scale = x.amax(-1)
    y = x.mul(reciprocal(scale, 1.0)[..., None]).clamp_(max=1.0)
    nothing = y < NOTHING  # not of a NaN
    z = y.view(torch.int32).clamp_(min=LEAST).neg_().add_(SUM).float()
    del y
    q = z.view(torch.int32).neg_().add_(PLACES).add_(upper_bits(random_words(shard, x), SHIFT))
    return q.bitwise_right_shift_(SHIFT).masked_fill_(nothing, 0), scale


def decode_tapered(q: Tensor, scale: Tensor, shard: Shard) -> Tensor:
    """Codes int32 [rows, blocks, block], scales [rows, blocks] -> fp32 [local_shape]."""
    import torch

    z = (q << SHIFT).neg_().add_(PLACES).view(torch.float32).int()
    value = z.neg_().add_(SUM).view(torch.float32).mul_(scale[..., None])
    return from_blocks(value.masked_fill_(q <= 0, 0.0), shard.rows)


@final
class Int8(Format):
    """``codes`` int8 (signed moments) or uint8 in the parameter's shape, ``scales`` fp32 [rows, ceil(cols / 256)].

    1.016 bytes per element.
    """

    name = "8bit"
    summary = "8-bit codes in blocks of 256, 1.02 bytes per element"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return too_small(shape)

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        return {
            "codes": TensorSpec("int8" if moment.signed else "uint8", rows.local_shape),
            "scales": scales_layout(rows, CODE.block),
        }

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        q = as_blocks(parts["codes"], shard.rows, CODE.block)
        scale = load_scales(parts["scales"], shard.rows, CODE.block)
        if moment.signed:
            return decode_signed(q.float(), scale, CODE, shard)
        return decode_tapered(q.int(), scale, shard)

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        q, scale = encode_signed(x, CODE, shard) if moment.signed else encode_tapered(x, shard)
        parts["codes"].copy_(from_blocks(q, shard.rows))
        store_scales(scale, parts["scales"])
        return x
