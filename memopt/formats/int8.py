"""``8bit``: one byte per element, one fp32 scale per 256."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard, as_blocks, from_blocks, too_small
from memopt.formats.blockwise import (
    Code,
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
    load_scales,
    scales_layout,
    store_scales,
)
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

CODE = Code(block=256, levels=127, top=255, mantissa=4)


@final
class Int8(Format):
    """``codes`` int8 (signed moments) or uint8 in the parameter's shape, ``scales`` fp32 [rows, ceil(cols / 256)].

    1.016 bytes per element; the codes are those of :mod:`memopt.formats.blockwise`.
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
        return decode_unsigned(q.int(), scale, CODE, shard)

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        q, scale = (encode_signed if moment.signed else encode_unsigned)(x, CODE, shard)
        parts["codes"].copy_(from_blocks(q, shard.rows))
        store_scales(scale, parts["scales"])
        return x
