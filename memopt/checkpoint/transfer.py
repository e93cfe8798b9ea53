"""One moment from where it is stored into the parts of another format, place or set of rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from memopt.checkpoint.codes import CHUNK_NUMEL, chunks, is_cut_by_rows, span
from memopt.checkpoint.report import Loss
from memopt.checkpoint.stored import LivePiece, Stored
from memopt.formats import Format, Shard
from memopt.formats.base import Parts
from memopt.geometry import Rows
from memopt.rules import Moment


class Target(NamedTuple):
    """Where a moment goes: ``parts`` hold the rows ``shard.rows`` and are zero."""

    moment: Moment
    format: Format
    shard: Shard
    parts: Parts

    def encode(self, x: Tensor, rows: Rows) -> None:
        """``x`` [rows.local_shape] fp32, into the rows that it is of."""
        parts = {}
        for part, tensor in self.parts.items():
            where = span(self.format, self.moment, part, self.shard.rows, rows)
            parts[part] = tensor if where is None else tensor[slice(*where)]
        device = next(iter(parts.values())).device
        self.format.write(x.to(device), parts, self.moment, self.shard._replace(rows=rows))

    def stored(self) -> Stored:
        """What is there now."""
        piece = LivePiece(self.shard.rows, self.parts)
        return Stored(self.moment, self.format, self.shard.rows.shape, (piece,))


def transfer(source: Stored, target: Target, scale: float, loss: Loss) -> None:
    """Copy where the encoding stays the same, else decode and encode a megabyte at a time.

    A format that cannot be cut by rows, and factors, which are means over all rows, take the parameter at once. Every
    rank must call this for every parameter: column means are summed over the ranks.
    """
    rows = target.shard.rows
    if source.format is target.format and source.moment.signed == target.moment.signed and scale == 1.0:
        source.copy(rows, target.parts)
        loss.copied += 1
        return
    loss.encoded += 1
    whole = [f for f, m in ((source.format, source.moment), (target.format, target.moment))
             if not is_cut_by_rows(f, m, rows.shape)]  # fmt: skip
    summed = target.format.name == "factored" or (target.format.name == "rowmean" and rows.flat == 1)
    at_once = bool(whole) or summed
    for piece in [rows] if at_once else chunks(rows):
        x = source.decode(piece)
        target.encode(x * scale if scale != 1.0 else x, piece)
    for piece in [rows] if whole else chunks(rows):
        _measure(source.decode(piece), target.stored().decode(piece), scale, loss)


def _measure(x: Tensor, y: Tensor, scale: float, loss: Loss) -> None:
    """Add |scale * x - y|² and |scale * x|², in fp64: squares of small gradients' squares underflow in fp32."""
    for a, b in zip(x.reshape(-1).split(CHUNK_NUMEL), y.reshape(-1).split(CHUNK_NUMEL), strict=True):
        exact = a.to(b.device).double().mul_(scale)
        loss.squared += float(exact.square().sum())
        loss.squared_error += float(exact.sub_(b.double()).square_().sum())
