"""``dynamic8``: bitsandbytes' 8-bit encoding, readable and writable without bitsandbytes."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, final

from memopt.engines.bitsandbytes import BLOCK, MIN_8BIT_NUMEL
from memopt.formats.base import Format, Parts, Shard
from memopt.geometry import Rows, Shape
from memopt.ledger import TensorSpec
from memopt.rules.base import Moment

if TYPE_CHECKING:
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

    Blocks run over the flattened tensor and straddle rows. The scales of some rows are those of every block with an
    element in them, so rows can be read one after another; they are written in whole blocks (:meth:`write_blocks`).
    Rounding is to nearest, as in bitsandbytes.
    """

    name = "dynamic8"
    summary = "bitsandbytes' and torchao's 8-bit code book, flat blocks of 256"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        numel = Rows.whole(shape).numel
        return f"fewer than {MIN_8BIT_NUMEL} elements" if numel < MIN_8BIT_NUMEL else None

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        first, stop = _blocks_of(rows)
        return {"codes": TensorSpec("uint8", rows.local_shape), "scales": TensorSpec("float32", (stop - first,))}

    def span(self, part: str, outer: Rows, inner: Rows) -> tuple[int, int]:
        """Where the rows ``inner`` stand along dimension 0 of the part that holds the rows ``outer``."""
        (begin, _), (first, stop) = (outer.bounds, inner.bounds) if part == "codes" else map(_blocks_of, (outer, inner))
        return first - begin, stop - begin

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        rows = shard.rows
        lead = _elements(rows)[0] % BLOCK
        book = code_book(moment.signed).to(parts["codes"].device)
        values = book[parts["codes"].reshape(-1).int()]
        scales = parts["scales"].repeat_interleave(BLOCK)[lead : lead + values.numel()]
        return values.mul_(scales).view(rows.local_shape)

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        assert shard.rows.is_whole, "rows share blocks: write_blocks"
        self.write_blocks(x.reshape(-1), parts, moment, 0)
        return x

    def write_blocks(self, x: Tensor, parts: Parts, moment: Moment, first: int) -> None:
        """``x`` [some] fp32, the elements from ``first`` on: whole blocks, or up to the last element."""
        import torch

        book = code_book(moment.signed).to(x.device)
        blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(-1)
        y = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(y, (book[1:] + book[:-1]) / 2, out_int32=True)
        parts["codes"].view(-1)[first : first + x.numel()].copy_(codes.view(-1)[: x.numel()])
        begin = first // BLOCK
        parts["scales"][begin : begin + len(scales)].copy_(scales)


def _elements(rows: Rows) -> tuple[int, int]:
    """The range of the flattened tensor that these rows are."""
    inner = prod(rows.shape[1:])
    return rows.bounds[0] * inner, rows.bounds[1] * inner


def _blocks_of(rows: Rows) -> tuple[int, int]:
    """The blocks with an element in these rows."""
    first, stop = _elements(rows)
    return (first // BLOCK, -(-stop // BLOCK)) if first < stop else (0, 0)
