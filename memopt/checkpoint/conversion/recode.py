"""One moment from where it is stored into the parts of another format, place or set of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor

from memopt.checkpoint.conversion.report import Loss
from memopt.checkpoint.state.moment_codes import CHUNK_NUMEL, chunks
from memopt.checkpoint.state.saved import LivePiece, Stored
from memopt.core.rows import Rows
from memopt.formats import Format, Shard
from memopt.formats.base import Parts
from memopt.formats.foreign.flat_blocks import FlatBlocks
from memopt.rules import Moment

#: ``read(rows)``: the values of these rows, fp32 [rows.local_shape]; they are not changed.
Read = Callable[[Rows], Tensor]


class Target(NamedTuple):
    """Where a moment goes: ``parts`` hold the rows ``shard.rows`` and are zero."""

    moment: Moment
    format: Format
    shard: Shard
    parts: Parts

    def encode(self, read: Read) -> None:
        """All rows, those that ``read`` gives a megabyte at a time."""
        if isinstance(self.format, FlatBlocks):
            for first, x in _blocks(read, self.shard.rows, self.format.block):
                self.format.write_blocks(x, self.parts, self.moment, first)
            return
        pieces = self._pieces()
        total = _RunningTotal(self.shard.total, len(pieces))
        for rows in pieces:
            parts = {}
            for part, tensor in self.parts.items():
                where = self.format.span(self.moment, part, self.shard.rows, rows)
                parts[part] = tensor if where is None else tensor[slice(*where)]
            x = read(rows).to(next(iter(parts.values())).device)
            self.format.write(x, parts, self.moment, self.shard._replace(rows=rows, total=total))

    def fill(self, value: float) -> None:
        """One number for every element."""

        def read(rows: Rows) -> Tensor:
            own = self.stored().decode(rows).shape if self.format.own_shape else rows.local_shape
            return torch.full(own, value)

        self.encode(read)

    def _pieces(self) -> list[Rows]:
        """At least one: a rank without rows takes part in the totals, too. Means of a vector that is cut between any
        two elements are of the whole vector at once."""
        rows = self.shard.rows
        if self.format.name == "rowmean" and rows.may_cut and len(rows.shape) < 2:
            return [rows]
        return _chunks(self.format, rows) or [rows]

    def stored(self) -> Stored:
        """What is there now."""
        piece = LivePiece(self.shard.rows, self.parts)
        return Stored(self.moment, self.format, self.shard.rows.shape, (piece,))


@final
class _RunningTotal:
    """:attr:`Shard.total` for a moment that is written in so many pieces: the sum over those before and, with the
    last, over the ranks."""

    def __init__(self, total: Callable[[Tensor], Tensor], pieces: int) -> None:
        self._total, self._left = total, pieces
        self._sum: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self._sum = x if self._sum is None else self._sum.add_(x)
        self._left -= 1
        return self._sum if self._left else self._total(self._sum)


def _blocks(read: Read, rows: Rows, block: int) -> Iterator[tuple[int, Tensor]]:
    """``(first, elements from there on)`` of the flattened parameter in whole blocks, out of the rows around them."""
    cols = rows.cols
    size = -(-max(CHUNK_NUMEL, cols) // block) * block
    for first in range(0, rows.numel, size):
        stop = min(first + size, rows.numel)
        around = rows._replace(first=first // cols, stop=-(-stop // cols))
        yield first, read(around).reshape(-1)[first - around.first * cols :][: stop - first]


def transfer(source: Stored, target: Target, scale: float, loss: Loss) -> None:
    """Copy where the encoding stays the same, else decode and encode a megabyte at a time (a row where that is more).

    Every rank must call this for every parameter: column means are summed over the ranks.
    """
    rows = target.shard.rows
    same = source.format is target.format and source.moment.signed == target.moment.signed and not source.code
    if same and scale == 1.0:
        source.copy(rows, target.parts)
        loss.copied += 1
        return
    loss.encoded += 1

    def scaled(piece: Rows) -> Tensor:
        x = source.decode(piece)
        return x * scale if scale != 1.0 else x

    target.encode(scaled)
    written = target.stored()
    for piece in _chunks(target.format, rows):
        _measure(source.decode(piece), written.decode(piece), scale, loss)


def _chunks(fmt: Format, rows: Rows) -> list[Rows]:
    return [rows] if fmt.own_shape else list(chunks(rows))


def _measure(x: Tensor, y: Tensor, scale: float, loss: Loss) -> None:
    """Add |scale * x - y|² and |scale * x|², in fp64: squares of small gradients' squares underflow in fp32."""
    for a, b in zip(x.reshape(-1).split(CHUNK_NUMEL), y.reshape(-1).split(CHUNK_NUMEL), strict=True):
        exact = a.to(b.device).double().mul_(scale)
        loss.squared += float(exact.square().sum())
        loss.squared_error += float(exact.sub_(b.double()).square_().sum())
