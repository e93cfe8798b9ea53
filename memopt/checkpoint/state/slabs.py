"""Parameters on meshes that do not cut them by rows over all ranks: HSDP's replicas, tensor parallelism, and those that
were not sharded.

A slab is what a rank has of a tensor: an offset and a size for each dimension. Ranks with the same slab are replicas,
of which the first one writes; the slabs of a tensor are a grid that covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from memopt.checkpoint.state.saved import DimRange, Record, SavedMaster, SavedPiece, Stored
from memopt.core.rows import Rows, Shape
from memopt.formats import FORMATS
from memopt.partitions.dtensor import chunk, is_dtensor

#: A range of each dimension but the first.
ColumnSlices = tuple[slice, ...]


class Slab(NamedTuple):
    """``offset`` and ``size`` by dimension, in the file of ``rank``."""

    rank: int
    offset: Shape
    size: Shape

    def rows(self, shape: Shape) -> Rows:
        """What :class:`~memopt.partitions.fsdp.Sharded` holds: its rows, of its columns alone."""
        if not shape:
            return Rows.whole(shape)
        first = self.offset[0]
        return Rows((shape[0], *self.size[1:]), first, first + self.size[0], 1)

    def columns(self) -> ColumnSlices:
        """Where it is along all dimensions but the first."""
        pairs = zip(self.offset[1:], self.size[1:], strict=True)
        return tuple(slice(at, at + n) for at, n in pairs)


def by_rows(shape: Shape, world_size: int) -> list[Slab]:
    """The slabs of a tensor that is cut by rows over all ranks."""
    found = []
    for rank in range(world_size):
        start, stop = chunk(shape, rank, world_size).bounds
        found.append(Slab(rank, (start, *(0 for _ in shape[1:])), (stop - start, *shape[1:])) if shape else _whole(()))
    return found


def here(p: Any, rank: int) -> Slab:
    """What this rank has of a parameter."""
    if not is_dtensor(p):
        return _whole(tuple(p.shape), rank)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(tuple(p.shape), p.device_mesh, p.placements)
    return Slab(rank, tuple(offset), tuple(size))


def _whole(shape: Shape, rank: int = 0) -> Slab:
    return Slab(rank, tuple(0 for _ in shape), shape)


def elsewhere(tensors: Mapping[str, Any], rank: int, world_size: int) -> dict[str, Slab]:
    """What this rank has of those that are not cut by rows over all ranks."""
    found = {}
    for name, p in tensors.items():
        shape, slab = tuple(p.shape), here(p, rank)
        usual = chunk(shape, rank, world_size).bounds if shape else (0, 1)
        mine = (slab.offset[0], slab.offset[0] + slab.size[0]) if shape else (0, 1)
        # Of no rows it does not matter where they are.
        same = mine == usual or (mine[0] == mine[1] and usual[0] == usual[1])
        if not (same and slab.size[1:] == shape[1:]):
            found[name] = slab
    return found


def together(gather: Callable[[Any], list[Any]], tensors: Mapping[str, Any], rank: int, world: int) -> dict[str, Any]:
    """name -> slabs, each in the file of the first rank that has it, of all tensors that are not cut by rows over all
    ranks on some rank. Every rank must call this, with a ``gather`` of JSON values by rank."""
    named = {name for names in gather(sorted(elsewhere(tensors, rank, world))) for name in names}
    if not named:
        return {}
    mine = {name: here(tensors[name], rank) for name in sorted(named)}
    everyone = gather({name: [slab.offset, slab.size] for name, slab in mine.items()})
    found: dict[str, list[Slab]] = {}
    for name in mine:
        distinct: dict[Any, Slab] = {}
        for of, slabs in enumerate(everyone):
            slab = Slab(of, *map(tuple, slabs[name]))
            if prod(slab.size) or not prod(tensors[name].shape):
                distinct.setdefault((slab.offset, slab.size), slab)
        found[name] = list(distinct.values())
    return found


def refuse(slabs: Any, shape: Shape, world_size: int) -> str | None:
    """What is wrong with the slabs that a manifest says of a tensor: they are a grid over all of it, or they are not
    believed."""
    if not isinstance(slabs, list) or not slabs:
        return "are none"
    axes: list[set[tuple[int, int]]] = [set() for _ in shape]
    seen = set()
    for slab in slabs:
        if not isinstance(slab, list) or len(slab) != 3 or type(slab[0]) is not int or not 0 <= slab[0] < world_size:
            return "are not of ranks of the checkpoint"
        offset, size = slab[1:]
        for numbers in (offset, size):
            if not isinstance(numbers, list) or len(numbers) != len(shape) or any(type(n) is not int for n in numbers):
                return "have other dimensions"
        for axis, at, n, most in zip(axes, offset, size, shape, strict=True):
            if not 0 <= at <= at + n <= most:
                return "reach beyond it"
            axis.add((at, n))
        seen.add((tuple(offset), tuple(size)))
    for axis, most in zip(axes, shape, strict=True):
        end = 0
        for at, n in sorted(axis):
            if at != end:
                return "leave out or repeat some of it"
            end = at + n
        if end != most:
            return "leave out or repeat some of it"
    if len(seen) != len(slabs) or len(slabs) != prod(map(len, axes)):
        return "are no grid"
    return None


def copy_rows(
    found: Iterable[Slab], shape: Shape, bounds: tuple[int, int], out: Tensor, file_of: Callable[[int], Any], key: str
) -> None:
    """These rows of a tensor into ``out``: ``file_of(rank)`` is the file that has the rank's slab under ``key``."""
    start, stop = bounds
    for slab in found:
        file = file_of(slab.rank)
        if not shape:
            file.read_into(key, None, out)
            continue
        first, last = slab.offset[0], slab.offset[0] + slab.size[0]
        low, high = max(start, first), min(stop, last)
        if low < high and slab.size[1:] == shape[1:]:
            file.read_into(key, (low - first, high - first), out[low - start : high - start])
        elif low < high:
            x = file.read(key, (low - first, high - first))
            out[(slice(low - start, high - start), *slab.columns())] = x


@final
class ColumnsPiece(SavedPiece):
    """Some rows of a tensor, whose columns are in several places. Of single elements: what is kept of them is one part
    in their own shape."""

    def __init__(self, rows: Rows, pieces: Sequence[tuple[ColumnSlices, SavedPiece]]) -> None:
        self.rows, self._pieces = rows, pieces

    def read(self, part: str, span: DimRange) -> Tensor:
        start, stop = span or (0, self.rows.bounds[1] - self.rows.bounds[0])
        parts = [(columns, piece.read(part, (start, stop))) for columns, piece in self._pieces]
        out = torch.empty((stop - start, *self.rows.shape[1:]), dtype=parts[0][1].dtype)
        for columns, x in parts:
            out[(slice(None), *columns)] = x
        return out

    def copy(self, part: str, span: DimRange, out: Tensor) -> None:
        out.copy_(self.read(part, span))


def assembled(shape: Shape, pieces: Iterable[tuple[Slab, SavedPiece]]) -> tuple[SavedPiece, ...]:
    """The pieces by rows, those of some columns put together."""
    found: dict[tuple[int, ...], list[tuple[ColumnSlices, SavedPiece]]] = {}
    whole: list[SavedPiece] = []
    for slab, piece in pieces:
        if slab.size[1:] == shape[1:]:
            whole.append(piece)
        else:
            found.setdefault((slab.offset[0], slab.size[0]), []).append((slab.columns(), piece))
    for (first, count), some in found.items():
        whole.append(ColumnsPiece(Rows(shape, first, first + count, 1), some))
    return tuple(sorted(whole, key=lambda piece: piece.rows.first))


@final
class _SlabPiece(SavedPiece):
    """The columns of a slab, of all rows of a moment."""

    def __init__(self, of: Stored, slab: Slab, *, raw: bool) -> None:
        self._of, self._slab, self._raw = of, slab, raw
        self.rows = Rows.whole((of.shape[0], *slab.size[1:]))

    def read(self, part: str, span: DimRange) -> Tensor:
        start, stop = span or (0, self._of.shape[0])
        rows = Rows(self._of.shape, start, stop, 1)
        x = self._of.part("", rows) if self._raw else self._of.decode(rows)
        return x.view(rows.local_shape)[(slice(None), *self._slab.columns())]

    def copy(self, part: str, span: DimRange, out: Tensor) -> None:
        out.copy_(self.read(part, span))


def of_columns(record: Record, slab: Slab) -> Record:
    """The record of the columns that a rank has, as if they were the parameter; as it is where the slab has all."""
    if not record.shape or slab.size[1:] == record.shape[1:]:
        return record
    shape, columns = (record.shape[0], *slab.size[1:]), slab.columns()
    moments = {
        name: Stored(one.moment, FORMATS["32bit"], shape, (_SlabPiece(one, slab, raw=False),))
        for name, one in record.moments.items()
    }
    weights = record.weights and _columns_of(record.weights, record.shape, columns)
    master = record.master
    if master is not None:
        one, beside = master.stored, master.weights and _columns_of(master.weights, record.shape, columns)
        stored = Stored(one.moment, one.format, shape, (_SlabPiece(one, slab, raw=True),))
        master = SavedMaster(master.master, master.dtype, stored, beside)
    return Record(record.name, shape, record.step, moments, record.stepped, record.dtype, master, weights, record.own)


def _columns_of(weights: Callable[[Rows], Tensor], shape: Shape, columns: ColumnSlices) -> Callable[[Rows], Tensor]:
    return lambda rows: weights(Rows(shape, *rows.bounds, 1))[(slice(None), *columns)]
