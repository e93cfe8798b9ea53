"""What a master keeps beside a parameter, at rest and on its way to another master."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

from torch import Tensor

from memopt.checkpoint.conversion.report import Loss
from memopt.checkpoint.state.moment_codes import CHUNK_NUMEL, chunks
from memopt.checkpoint.state.saved import LivePiece, SavedMaster, SavedPiece, Stored
from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats.base import Format, Parts, Shard
from memopt.masters import MASTERS, Master
from memopt.rules import Moment


@final
class Raw(Format):
    """Numbers as they are, in the parameter's shape and any dtype."""

    name = "raw"
    summary = "numbers as they are"

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def declines(self, moment: Moment, shape: Shape) -> str | None:
        return None

    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        return {"": TensorSpec(self.dtype, rows.local_shape)}

    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        return parts[""].float()

    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        parts[""].copy_(x)
        return x


def saved_master(
    master: str, dtype: str, shape: Shape, pieces: tuple[SavedPiece, ...], weights: Callable[[Rows], Tensor] | None
) -> SavedMaster:
    found = MASTERS[master]
    raw = Raw(found.stored_dtype(dtype))
    return SavedMaster(found, dtype, Stored(Moment(found.key), raw, shape, pieces), weights)


def live(master: Master, dtype: str, rows: Rows, state: Mapping[str, Tensor], p: Tensor | None) -> SavedMaster | None:
    """That of a running optimizer; ``p`` [rows.local_shape] are the parameter's rows."""
    if not master.layout(rows, dtype):
        return None
    weights = None if p is None else lambda piece: cut(p, rows, piece)
    return saved_master(master.name, dtype, rows.shape, (LivePiece(rows, {"": state[master.key]}),), weights)


def refuse(saved: SavedMaster, master: Master, p: Tensor | None) -> str | None:
    """Why ``saved`` cannot become what ``master`` keeps, or None."""
    if saved.master is master or not master.key or p is not None or saved.weights is not None:
        return None
    return (
        f"what +{saved.master.name} keeps means something beside its weights only, and there are none here: "
        f"convert to +{saved.master.name} or no master, or load model and optimizer and use convert_"
    )


def move(saved: SavedMaster, master: Master, rows: Rows, p: Tensor | None, target: Tensor, loss: Loss) -> None:
    """Into zeroed ``target`` [rows.local_shape]: bit for bit within a master, else as precisely as the other can.

    ``p`` are the weights beside which it will stand, by default those beside which it stood.
    """
    if saved.master is master:
        saved.stored.copy(rows, {"": target})
        loss.copied += 1
        return
    loss.encoded += 1
    for piece in chunks(rows):
        if p is not None:
            weight = cut(p, rows, piece)
        else:
            assert saved.weights is not None
            weight = saved.weights(piece)
        x = saved.master.read(weight, saved.stored.part("", piece).to(weight.device))
        local = cut(target, rows, piece)
        beside = local.to(weight.device)
        master.keep(x, weight, beside)
        local.copy_(beside)
        _measure(x, master.read(weight, beside), loss)


def _measure(x: Tensor, y: Tensor, loss: Loss) -> None:
    for a, b in zip(x.reshape(-1).split(CHUNK_NUMEL), y.reshape(-1).split(CHUNK_NUMEL), strict=True):
        exact = a.double()
        loss.squared += float(exact.square().sum())
        loss.squared_error += float(exact.sub_(b.double()).square_().sum())


def cut(x: Tensor, outer: Rows, inner: Rows) -> Tensor:
    """The rows ``inner`` of a tensor that holds the rows ``outer``, a view."""
    if inner == outer:
        return x
    first, (start, stop) = outer.bounds[0], inner.bounds
    return x[start - first : stop - first]
