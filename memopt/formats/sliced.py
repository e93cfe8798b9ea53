"""``sliced``: every eleventh element of a row. Asked for by a rule, not by a spec: for statistics of a sample."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, final

from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape, indices_of_row, is_narrow
from memopt.formats.base import Format, Parts, Shard
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

#: One element of so many is kept.
EVERY = 11


def row_of(shape: Shape) -> int:
    """Elements in which every eleventh is counted anew: a row's, of narrow rows all that are taken together, whatever
    the unit in which a rank's are cut.

    >>> row_of((512, 1024)), row_of((600,)), row_of((4096, 16)), row_of((515, 9))
    (1024, 256, 256, 252)
    """
    return indices_of_row(shape) * prod(shape[1:])


def _before(i: int, row: int) -> int:
    """How many of the first i elements are kept: every eleventh of each ``row``."""
    return i // row * -(-row // EVERY) + -(-(i % row) // EVERY) if i else 0


def _elements(rows: Rows) -> tuple[int, int]:
    """These rows as a range of the flattened parameter."""
    start, stop = rows.bounds
    each = prod(rows.shape[1:])
    return start * each, stop * each


def _is_long(rows: Rows) -> bool:
    """Whether these are rows of a matrix, each an index of dimension 0, and none of them ragged."""
    return len(rows.shape) >= 2 and not is_narrow(rows.shape)


@final
class Sliced(Format):
    """fp32, 4 bytes of every 11th element, counted anew in each row (of a vector and of narrow rows: in each that is
    taken together, 256 elements or less), so that it is cut as the parameter is. All other elements are zero, and
    ``write`` returns them as such."""

    name = "sliced"
    summary = "fp32, every 11th element of a row"

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return None

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        if _is_long(rows):
            return {"": TensorSpec("float32", (rows.count, -(-rows.cols // EVERY)))}
        start, stop = _elements(rows)
        row = row_of(rows.shape)
        return {"": TensorSpec("float32", (_before(stop, row) - _before(start, row),))}

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        rows = shard.rows
        x = parts[""].new_zeros(rows.local_shape)
        if _is_long(rows):
            x.view(rows.count, rows.cols)[:, ::EVERY] = parts[""]
        else:
            x.view(-1)[_places(rows, x)] = parts[""]
        return x

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        rows = shard.rows
        if _is_long(rows):
            parts[""].copy_(x.reshape(rows.count, rows.cols)[:, ::EVERY])
        else:
            parts[""].copy_(x.reshape(-1)[_places(rows, x)])
        return self.read(parts, moment, shard)


def _places(rows: Rows, like: Tensor) -> Tensor:
    """Where the elements that are kept stand among those that are here."""
    import torch

    start, stop = _elements(rows)
    return (torch.arange(start, stop, device=like.device) % row_of(rows.shape) % EVERY == 0).nonzero().view(-1)
