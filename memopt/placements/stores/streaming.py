"""A placement's store whose state is brought to the step chunk by chunk, through a bounded number of buffers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from memopt.layout.chunks import (
    PAGE,
    Buffers,
    ChunkedState,
    Extent,
    Part,
    Piece,
    buffers,
    extent,
    pack,
    pieces,
    target_of,
)
from memopt.layout.param_step import Work
from memopt.placements.base import PlacementStore, StepFunction
from memopt.placements.transfer.pipeline import Operation, Streams, run_chains

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memopt.layout.param import ParamLayout


class ChunkSlice(NamedTuple):
    """One piece of one work's state, and the layout of its rows."""

    work: Work
    piece: Piece
    number: int  # of the piece among the parameter's
    layout: ParamLayout

    @property
    def nbytes(self) -> int:
        return self.piece.nbytes

    def on(self, state: dict[str, Tensor]) -> Work:
        """The work that steps these rows alone, on this state."""
        work = self.work
        state["step"] = work.state["step"]
        if self.layout is work.layout:
            return Work(work.layout, work.p, work.g, state, *work[4:])
        begin = work.rows.bounds[0]
        start, stop = (bound - begin for bound in self.piece.rows.bounds)
        return work._replace(layout=self.layout, p=work.p[start:stop], g=work.g[start:stop], state=state)


def tensor_in(buffer: Tensor, at: int, part: Part) -> Tensor:
    """The part as it stands in a buffer of bytes, uint8 [n]."""
    import torch

    return buffer[at : at + part.nbytes].view(getattr(torch, part.dtype)).view(part.shape)


def bytes_of(whole: Tensor, part: Part) -> Tensor:
    """Where the part is in the tensor of all rows, as bytes, uint8 [nbytes]."""
    import torch

    return whole.view(-1).view(torch.uint8)[part.offset : part.offset + part.nbytes]


#: Tensors in buffers that are remembered, at most.
REMEMBERED = 1 << 16
#: A slice, and where it begins in the buffer.
Placed = tuple[ChunkSlice, int]


def placed(chunk: Sequence[ChunkSlice]) -> list[Placed]:
    """One behind the other."""
    found, at = [], 0
    for chunk_slice in chunk:
        found.append((chunk_slice, at))
        at += chunk_slice.nbytes
    return found


class Streamed(PlacementStore):
    """Subclasses say what a chunk's chain of operations is and allocate the buffers."""

    #: Bytes of a chunk, unless the workspace is too small for several, and the number of buffers at most.
    target = 16 * 2**20
    most = 6
    #: Bytes at whose multiples the parts of a parameter's state begin where they are kept.
    align = PAGE

    def __init__(self, placement: Any, workspace: int) -> None:
        super().__init__(placement)
        self.nbytes = workspace
        self.buffers = Buffers(0, 0)
        self._cuts: dict[str, tuple[ParamLayout, list[Piece], list[ParamLayout]]] = {}
        self._in_buffers: dict[tuple[int, Part, int], Tensor] = {}
        self._extents: dict[str, Extent] = {}
        self._streams: Streams | None = None  # of the last step

    def in_place(self, device: torch.device) -> bool:
        return False

    @abstractmethod
    def chain(self, chunk: Sequence[Placed], run: StepFunction, device: torch.device) -> list[Operation]:
        """The operations of one chunk, the first of which fetches."""

    def begun(self, slices: Sequence[ChunkSlice], device: torch.device) -> list[list[Placed]]:
        """Chunks that have been begun before the step, in the buffers 0, 1, …"""
        return []

    @abstractmethod
    def reserve(self, wanted: Buffers, device: torch.device) -> None:
        """Allocate buffers where those that are there are not these."""

    @abstractmethod
    def streams(self, device: torch.device) -> Streams: ...

    def step(self, works: Sequence[Work], run: StepFunction, chunked: Callable[[Work], ChunkedState]) -> None:
        by_device: dict[torch.device, list[Work]] = {}
        for work in works:
            by_device.setdefault(work.p.device, []).append(work)
        for device, mine in by_device.items():
            self._step(mine, run, chunked, device)

    def _step(
        self, works: Sequence[Work], run: StepFunction, chunked: Callable[[Work], ChunkedState], device: torch.device
    ) -> None:
        slices = self._slices(works, chunked)
        self._fit(device)
        chunks: list[list[Placed]]
        if any(work.groups for work in works):
            # Sums over ranks are taken in the order of the chunks, and ranks hold different numbers of rows.
            chunks = [[(chunk_slice, 0)] for chunk_slice in slices]
        else:
            empty = [chunk_slice for chunk_slice in slices if not chunk_slice.nbytes]
            if empty:
                run([chunk_slice.on(dict(chunk_slice.work.state)) for chunk_slice in empty])
            chunks = self.begun(slices, device)
            there = {(chunk_slice.work.name, chunk_slice.number) for chunk in chunks for chunk_slice, _ in chunk}
            rest = [
                chunk_slice
                for chunk_slice in slices
                if chunk_slice.piece.nbytes and (not there or (chunk_slice.work.name, chunk_slice.number) not in there)
            ]
            chunks += [placed(chunk) for chunk in pack(rest, self.buffers.nbytes)]
        chains = [self.chain(chunk, run, device) for chunk in chunks]
        if chains:
            self._streams = self.streams(device)
            run_chains(chains, self._streams, self.buffers.number)

    def _slices(self, works: Sequence[Work], chunked: Callable[[Work], ChunkedState]) -> list[ChunkSlice]:
        found: list[ChunkSlice] = []
        for work in works:
            layout, cut, layouts = self._cut(work, chunked)
            if len(cut) == 1:
                found.append(ChunkSlice(work, cut[0], 0, layout))
            else:
                found += [ChunkSlice(work, p, i, layouts[i]) for i, p in enumerate(cut)]
        return found

    def abandon(self) -> None:
        super().abandon()
        if self._streams is not None:
            with suppress(Exception):
                self._streams.synchronize()

    def prepare(self, chunked: Mapping[str, ChunkedState], device: torch.device, also: bool = False) -> None:
        found = {name: extent(*one[:3], self._target) for name, one in chunked.items()}
        self._extents = {**self._extents, **found} if also else found
        self._fit(device)

    @property
    def _target(self) -> int:
        return target_of(self.nbytes, self.target, self.most)

    def _fit(self, device: torch.device) -> None:
        wanted = buffers(list(self._extents.values()), self._target, self.nbytes, self.most)
        if wanted != self.buffers:
            self.buffers = Buffers(0, 0)  # until they are there
            self._in_buffers.clear()
            self.reserve(wanted, device)
            self.buffers = wanted

    def _cut(
        self, work: Work, chunked: Callable[[Work], ChunkedState]
    ) -> tuple[ParamLayout, list[Piece], list[ParamLayout]]:
        """A work's layout, the pieces of its state, and the layout of each: cut once for a layout."""
        entry = self._cuts.get(work.layout.name)
        if entry is None or entry[0] is not work.layout:
            one = chunked(work)
            cut = pieces(work.name, *one[:3], self._target, self.align)
            entry = self._cuts[work.name] = work.layout, cut, [work.layout.at(p.rows) for p in cut]
            self._extents[work.name] = extent(*one[:3], self._target)
        return entry

    def in_buffer(self, buffer: Tensor, at: int, part: Part) -> Tensor:
        """:func:`tensor_in` of one of the buffers, remembered: most steps are cut as the one before."""
        key = id(buffer), part, at
        found = self._in_buffers.get(key)
        if found is None:
            if len(self._in_buffers) > REMEMBERED:
                self._in_buffers.clear()
            found = self._in_buffers[key] = tensor_in(buffer, at, part)
        return found
