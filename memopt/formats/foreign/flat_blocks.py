"""Codes of other tools: blocks that run over the flattened tensor and straddle rows."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import TYPE_CHECKING, ClassVar

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

#: From this many elements on the other tools keep state in 8 bits; blocks run over the flattened tensor.
MIN_8BIT_NUMEL = 4096


class FlatBlocks(Format):
    """``codes`` in the parameter's shape and ``scales`` [ceil(numel / block)]. Subclasses are final.

    The scales of some rows are those of every block with an element in them, so rows can be read one after another;
    they are written in whole blocks (:meth:`write_blocks`). Rounding is to nearest, as in the tools.
    """

    scale_dtype: ClassVar[str] = "float32"

    def __init__(self, block: int) -> None:
        self.block = block

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return f"fewer than {MIN_8BIT_NUMEL} elements" if prod(shape) < MIN_8BIT_NUMEL else None

    @abstractmethod
    def codes_dtype(self, moment: Moment) -> str:
        """dtype of the codes."""

    @abstractmethod
    def decode(self, codes: Tensor, scales: Tensor, moment: Moment) -> Tensor:
        """fp32 [n], a new tensor, of ``codes`` [n] and the scale of each, fp32 [n]."""

    @abstractmethod
    def encode(self, blocks: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        """``(codes [count, block], scales [count])`` of ``blocks`` fp32 [count, block]."""

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        first, stop = self.blocks_of(rows)
        codes = TensorSpec(self.codes_dtype(moment), rows.local_shape)
        return {"codes": codes, "scales": TensorSpec(self.scale_dtype, (stop - first,))}

    def span(self, moment: Moment, part: str, outer: Rows, inner: Rows) -> tuple[int, int] | None:
        if inner == outer or self.is_shared(moment, part, outer.shape):
            return None
        where = self.where_codes if part == "codes" else self.blocks_of
        (begin, _), (first, stop) = where(outer), where(inner)
        return first - begin, stop - begin

    def where_codes(self, rows: Rows) -> tuple[int, int]:
        """The range along dimension 0 of the codes of the whole tensor."""
        return rows.bounds

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        rows = shard.rows
        lead, numel = elements(rows)[0] % self.block, rows.numel
        scales = parts["scales"].float().repeat_interleave(self.block)[lead : lead + numel]
        return self.decode(self.unpack(parts["codes"], lead, numel), scales, moment).view(rows.local_shape)

    def unpack(self, codes: Tensor, lead: int, numel: int) -> Tensor:
        """The codes of ``numel`` elements, flat, of which the first is ``lead`` elements into its block."""
        return codes.reshape(-1)

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        assert shard.rows.is_whole, "rows share blocks: write_blocks"
        self.write_blocks(x.reshape(-1), parts, moment, 0)
        return x

    def write_blocks(self, x: Tensor, parts: Parts, moment: Moment, first: int) -> None:
        """``x`` [some] fp32, the elements from ``first`` on: whole blocks, or up to the last element."""
        import torch

        blocks = torch.nn.functional.pad(x, (0, -x.numel() % self.block)).view(-1, self.block)
        codes, scales = self.encode(blocks, moment)
        self.pack(codes.view(-1)[: x.numel()], parts["codes"].view(-1), first)
        begin = first // self.block
        parts["scales"][begin : begin + len(scales)].copy_(scales)

    def pack(self, codes: Tensor, out: Tensor, first: int) -> None:
        """Put the codes of the elements from ``first`` on into the flat ``out``."""
        out[first : first + codes.numel()].copy_(codes)

    def blocks_of(self, rows: Rows) -> tuple[int, int]:
        """The blocks with an element in these rows."""
        first, stop = elements(rows)
        return (first // self.block, -(-stop // self.block)) if first < stop else (0, 0)


def elements(rows: Rows) -> tuple[int, int]:
    """The range of the flattened tensor that these rows are."""
    inner = prod(rows.shape[1:])
    return rows.bounds[0] * inner, rows.bounds[1] * inner


def relative(blocks: Tensor, scales: Tensor) -> Tensor:
    """``blocks`` [count, block] over their scales [count]; zeros where that is zero."""
    return blocks / scales.where(scales != 0, 1)[:, None]


def nearest(book: Tensor, y: Tensor) -> Tensor:
    """Indices, int32 [y.shape], of the nearest values of an ascending ``book``."""
    import torch

    return torch.bucketize(y, (book[1:] + book[:-1]) / 2, out_int32=True)
