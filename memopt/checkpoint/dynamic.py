"""``dynamic8``: bitsandbytes' 8-bit encoding, readable and writable without bitsandbytes."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, final

from memopt.engines.bitsandbytes import BLOCK, MIN_8BIT_NUMEL
from memopt.formats.base import Format, Parts, Shard
from memopt.geometry import Rows, Shape
from memopt.ledger import TensorSpec
from memopt.rules.base import Moment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Decades that the code book spans.
EXPONENTS = 7


@lru_cache
def code_book(signed: bool) -> Tensor:
    """The dynamic map, fp32 [256], ascending.

    For decades i = 0 … 6: the midpoints of n + 1 points between 0.1 and 1, times 10^(i - 6), with n = 2^i signed
    (and mirrored) or 2^(i + 1) unsigned; then 0 and 1. Source: Dettmers et al., "8-bit optimizers via block-wise
    quantization", ICLR 2022; torchao's map for 8 bits is the same.
    """
    import torch

    values = [0.0, 1.0]
    for i in range(EXPONENTS):
        points = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        means = ((points[:-1] + points[1:]) / 2 * 10.0 ** (i - EXPONENTS + 1)).tolist()
        values += means + ([-x for x in means] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@final
class Dynamic8(Format):
    """``codes`` uint8 in the parameter's shape, indices into :func:`code_book`; ``scales`` fp32 [ceil(numel / 256)].

    Blocks run over the flattened tensor and straddle rows, so a shard cannot be cut out without decoding: parts are
    always those of the whole parameter, and ``read`` cuts the rows asked for out of what it decoded. Rounding is to
    nearest, as in bitsandbytes.
    """

    name = "dynamic8"
    summary = "bitsandbytes' and torchao's 8-bit code book, flat blocks of 256"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        numel = Rows.whole(shape).numel
        return f"fewer than {MIN_8BIT_NUMEL} elements" if numel < MIN_8BIT_NUMEL else None

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        numel = Rows.whole(rows.shape).numel
        return {"codes": TensorSpec("uint8", rows.shape), "scales": TensorSpec("float32", (-(-numel // BLOCK),))}

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        from memopt.partitions.base import owned

        book = code_book(moment.signed).to(parts["codes"].device)
        values = _blocks(book[parts["codes"].reshape(-1).int()]).mul_(parts["scales"][:, None])
        shape = shard.rows.shape
        return owned(values.view(-1)[: Rows.whole(shape).numel].view(shape), shard.rows)

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        import torch

        book = code_book(moment.signed).to(x.device)
        blocks = _blocks(x.reshape(-1))
        scales = blocks.abs().amax(-1)
        y = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(y, (book[1:] + book[:-1]) / 2, out_int32=True)
        parts["codes"].copy_(codes.view(-1)[: x.numel()].view(x.shape))
        parts["scales"].copy_(scales)
        return x


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """A flat tensor as [blocks, 256], the last block padded with zeros; a copy only where it must be padded."""
    padding = -flat.numel() % BLOCK
    if padding:
        import torch

        flat = torch.cat([flat, flat.new_zeros(padding)])
    return flat.view(-1, BLOCK)
