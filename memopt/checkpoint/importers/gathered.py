"""Moments that are not stored as ours are: in another code, or in parts by several ranks. Read a range at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import final

import torch
from torch import Tensor

from memopt.checkpoint.state.moment_codes import CODES
from memopt.checkpoint.state.saved import DimRange, SavedPiece, Stored
from memopt.core.rows import Rows, Shape
from memopt.rules import Moment

#: Moments that are never negative, wherever they come from.
NON_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")

#: ``gather(first, stop)``: so many of the flattened parameter's elements, in one dimension.
Gather = Callable[[int, int], Tensor]


@final
class GatheredPiece(SavedPiece):
    """A whole parameter's moment as fp32, of which a range along dimension 0 is gathered each time it is read."""

    def __init__(self, shape: Shape, gather: Gather) -> None:
        self.rows, self._gather = Rows.whole(shape), gather

    def read(self, part: str, span: DimRange) -> Tensor:
        shape = self.rows.shape
        first, stop = span or (0, shape[0] if shape else 1)
        inner = prod(shape[1:])
        return self._gather(first * inner, stop * inner).float().view((stop - first, *shape[1:]) if shape else ())

    def copy(self, part: str, span: DimRange, out: Tensor) -> None:
        out.copy_(self.read(part, span))


def gathered(
    name: str, shape: Shape, gather: Gather, code: str = "", coded: Mapping[str, Tensor] | None = None
) -> Stored:
    """A moment that reads as fp32; ``code`` names what it is decoded from, ``coded`` are the tensors of that."""
    moment = Moment(name, signed=name not in NON_NEGATIVE)
    return Stored(moment, CODES["32bit"], shape, (GatheredPiece(shape, gather),), code, coded)


def from_fragments(fragments: list[Tensor]) -> Gather:
    """Of flat tensors that follow one another."""

    def gather(first: int, stop: int) -> Tensor:
        found, begin = [], 0
        for fragment in fragments:
            end = begin + fragment.numel()
            if begin < stop and first < end:
                found.append(fragment[max(first - begin, 0) : stop - begin])
            begin = end
        return torch.cat(found) if len(found) != 1 else found[0]

    return gather
