"""``dynamic8``: bitsandbytes' 8-bit encoding, readable and writable without bitsandbytes."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, final

from memopt.formats.foreign.flat_blocks import FlatBlocks, nearest, relative
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

#: Decades that the code book of 8 bits spans.
EXPONENTS = 7


@lru_cache
def code_book(signed: bool, exponents: int = EXPONENTS) -> Tensor:
    """The dynamic map, fp32 [2^(exponents + 1)], ascending.

    For decades i = 0 … exponents - 1: the midpoints of n + 1 points between 0.1 and 1, times 10^(i + 1 - exponents),
    with n = 2^i signed (and mirrored) or 2^(i + 1) unsigned; then 0 and 1. Source: Dettmers et al., "8-bit optimizers
    via block-wise quantization", ICLR 2022; torchao's maps are the same.
    """
    import torch

    values = [0.0, 1.0]
    for i in range(exponents):
        points = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        means = ((points[:-1] + points[1:]) / 2 * 10.0 ** (i - exponents + 1)).tolist()
        values += means + ([-x for x in means] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@final
class Dynamic8(FlatBlocks):
    """``codes`` uint8, indices into :func:`code_book`; ``scales`` fp32, the largest magnitude of each block."""

    name = "dynamic8"
    summary = "bitsandbytes' and torchao's 8-bit code book, flat blocks of 256"

    def codes_dtype(self, moment: Moment) -> str:
        return "uint8"

    def decode(self, codes: Tensor, scales: Tensor, moment: Moment) -> Tensor:
        return code_book(moment.signed).to(codes.device)[codes.int()].mul_(scales)

    def encode(self, blocks: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        scales = blocks.abs().amax(-1)
        return nearest(code_book(moment.signed).to(blocks.device), relative(blocks, scales)), scales


#: By its block, one for each: state that has the same one is copied bit for bit.
dynamic8 = lru_cache(Dynamic8)
