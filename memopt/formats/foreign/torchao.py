"""torchao's encodings of 4 bits and of 8-bit floats, readable and writable without torchao.

Source: torchao/optim/subclass_4bit.py and subclass_fp8.py of torchao 0.18; for 4 bits Li et al., "Memory efficient
optimizers with 4-bit states", NeurIPS 2023.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.foreign.bitsandbytes import code_book
from memopt.formats.foreign.flat_blocks import FlatBlocks, nearest, relative
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

#: The largest number of float8_e4m3fn.
E4M3_MAX = 448.0


class _Whole(FlatBlocks):
    """torchao leaves what has no whole number of blocks in 32 bits."""

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        ragged = f"no whole number of blocks of {self.block}" if prod(shape) % self.block else None
        return super().declines(moment, shape) or ragged


@lru_cache
def book_of_4_bits(signed: bool) -> Tensor:
    """fp32 [16], ascending: the dynamic map of three decades, or 1/16 … 1, which has no zero."""
    import torch

    return code_book(True, exponents=3) if signed else torch.linspace(0, 1, 17)[1:]


@final
class Torchao4(_Whole):
    """``codes`` uint8 [numel / 2], flat: indices into :func:`book_of_4_bits`, the first of two in the upper bits;
    ``scales`` fp32, the largest magnitude of each block."""

    name = "torchao 4bit"
    summary = "torchao's 4-bit code books, flat blocks of 128"

    def codes_dtype(self, moment: Moment) -> str:
        return "uint8"

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        first, stop = self.where_codes(rows)
        return super().layout(moment, rows) | {"codes": TensorSpec("uint8", (stop - first,))}

    def where_codes(self, rows: Rows) -> tuple[int, int]:
        first, stop = self.blocks_of(rows)
        return first * self.block // 2, stop * self.block // 2

    def unpack(self, codes: Tensor, lead: int, numel: int) -> Tensor:
        import torch

        return torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)[lead : lead + numel]

    def pack(self, codes: Tensor, out: Tensor, first: int) -> None:
        out[first // 2 : (first + codes.numel()) // 2].copy_(codes[::2] << 4 | codes[1::2])

    def decode(self, codes: Tensor, scales: Tensor, moment: Moment) -> Tensor:
        return book_of_4_bits(moment.signed).to(codes.device)[codes.int()].mul_(scales)

    def encode(self, blocks: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        scales = blocks.abs().amax(-1)
        return nearest(book_of_4_bits(moment.signed).to(blocks.device), relative(blocks, scales)), scales


@final
class TorchaoFp8(_Whole):
    """``codes`` float8_e4m3fn; ``scales`` fp32, the largest magnitude of each block over 448."""

    name = "torchao fp8"
    summary = "torchao's 8-bit floats, flat blocks of 256"

    def codes_dtype(self, moment: Moment) -> str:
        return "float8_e4m3fn"

    def decode(self, codes: Tensor, scales: Tensor, moment: Moment) -> Tensor:
        return codes.float().mul_(scales)

    def encode(self, blocks: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        import torch

        scales = blocks.abs().amax(-1) / E4M3_MAX
        return relative(blocks, scales).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


#: By their block, one for each: state that has the same one is copied bit for bit.
torchao4, torchao_fp8 = lru_cache(Torchao4), lru_cache(TorchaoFp8)
