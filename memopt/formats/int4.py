"""``4bit``: half a byte per element, one fp32 scale per 128."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard, as_blocks, as_rows, from_blocks, too_small
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

CODE = Code(block=128, levels=7, top=15, mantissa=0)


@final
class Int4(Format):
    """``codes`` uint8 [rows, ceil(cols / 2)], two codes per byte, the even column in the low half;
    ``scales`` fp32 [rows, ceil(cols / 128)]. Signed codes are two's complement.

    0.531 bytes per element; the codes are those of :mod:`memopt.formats.blockwise`. A single second moment is off by
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
        return decode_unsigned(q, scale, CODE, shard)

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        q, scale = (encode_signed if moment.signed else encode_unsigned)(x, CODE, shard)
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
