"""The store of ``@host``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import Tensor

from memopt.core.host_memory import bytes_view
from memopt.core.ledger import Line
from memopt.layout.chunks import Buffers, ChunkedState, Part, Piece, StoreOptions
from memopt.placements.base import Placement, StepFunction
from memopt.placements.stores.mapped_files import tensors_in
from memopt.placements.stores.streaming import ChunkSlice, Placed, Streamed, bytes_of, tensor_in
from memopt.placements.transfer.device import DeviceTransfer, transfer_of
from memopt.placements.transfer.pipeline import Operation, Streams
from memopt.placements.workspaces import HOST_MOST, HOST_TARGET, buffer_lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from memopt.layout.param_step import Work


#: Bytes at whose multiples parts begin; states of at most so many bytes that lie in slabs; bytes of the largest slab.
ALIGN, SMALL, SLAB = 64, 128 * 2**10, 4 * 2**20


class _HostChunk(NamedTuple):
    """``pairs`` is what is copied, ``nbytes`` how much; ``states`` are the slices' states in each buffer that the chunk
    has been in."""

    pieces: list[Piece]
    addresses: list[int]  # of the state in host memory, which the pairs keep alive
    pairs: list[tuple[Tensor, int]]
    nbytes: int
    states: dict[int, list[dict[str, Tensor]]]


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


@final
class Pinned(Streamed):
    target, most = HOST_TARGET, HOST_MOST
    align = ALIGN

    def __init__(self, placement: Placement, store_options: StoreOptions) -> None:
        super().__init__(placement, store_options.options["workspace"])
        self._device: list[Tensor] = []
        self._slabs: list[Tensor] = []  # of small states, side by side: they are copied at once
        self._end = 0  # of what is taken of the last one
        self._where = "cpu"
        self._transfer: DeviceTransfer | None = None
        #: By the first slice: most steps are cut as the one before. What a step does not use is forgotten.
        self._chunks: dict[tuple[str, int], _HostChunk] = {}
        self._before: dict[tuple[str, int], _HostChunk] = {}

    def in_place(self, device: torch.device) -> bool:
        return transfer_of(device) is None

    def allocate(self, name: str, lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
        transfer = transfer_of(device)
        if transfer is None:
            return super().allocate(name, lines, device)
        self._chunks.clear()  # memory that they keep may be in the way
        parts, end = [], 0
        for line in lines:
            parts.append(Part(line.key, line.dtype, line.shape, end, line.nbytes, 0))
            end += -(-line.nbytes // ALIGN) * ALIGN
        if not end:
            return tensors_in(None, parts)
        memory, begin = self._room(transfer, end)
        return tensors_in(bytes_view(memory), [part._replace(offset=begin + part.offset) for part in parts])

    def _room(self, transfer: DeviceTransfer, nbytes: int) -> tuple[Tensor, int]:
        """Host memory for so many bytes, and where in it they begin: of large states their own, of small ones a slab's,
        each as large as all before together, so that at most half of what is taken lies idle."""
        if nbytes > SMALL:
            return transfer.host(nbytes), 0
        if not self._slabs or self._end + nbytes > self._slabs[-1].numel():
            before = self._slabs[-1].numel() if self._slabs else SMALL // 2
            self._slabs.append(transfer.host(min(2 * before, SLAB)))
            self._end = 0
        begin, self._end = self._end, self._end + nbytes
        return self._slabs[-1], begin

    def step(self, works: Sequence[Work], run: StepFunction, chunked: Callable[[Work], ChunkedState]) -> None:
        on_host = [work for work in works if transfer_of(work.p.device) is None]
        if on_host:
            run(on_host)
        there = [work for work in works if transfer_of(work.p.device) is not None]
        if len(there) > 1:  # parameters that step inside backward() come one by one
            self._before, self._chunks = self._chunks, {}
        try:
            super().step(there, run, chunked)
        finally:
            self._before = {}

    def prepare(self, chunked: Mapping[str, ChunkedState], device: torch.device, also: bool = False) -> None:
        if transfer_of(device) is not None:
            super().prepare(chunked, device, also)

    def chain(self, chunk: Sequence[Placed], run: StepFunction, device: torch.device) -> list[Operation]:
        cached = self._chunk(chunk)
        pairs, nbytes = cached.pairs, cached.nbytes

        def up(i: int) -> None:
            for there, at in pairs:
                self._device[i][at : at + len(there)].copy_(there, non_blocking=True)

        def step(i: int) -> None:
            states = cached.states.get(i)
            if states is None:
                states = cached.states[i] = [self._in_buffer(i, *one) for one in chunk]
            run([chunk_slice.on(state) for (chunk_slice, _), state in zip(chunk, states, strict=True)])

        def down(i: int) -> None:
            for there, at in pairs:
                there.copy_(self._device[i][at : at + len(there)], non_blocking=True)

        return [Operation("up", up, nbytes), Operation("step", step, nbytes), Operation("down", down, nbytes)]

    def _in_buffer(self, i: int, chunk_slice: ChunkSlice, at: int) -> dict[str, Tensor]:
        """The state of a slice as it stands in the buffer ``i``."""
        return {
            part.key: tensor_in(self._device[i], at + part.at, part)
            if part.nbytes
            else chunk_slice.work.state[part.key]
            for part in chunk_slice.piece.parts
        }

    def _chunk(self, chunk: Sequence[Placed]) -> _HostChunk:
        """What is the same at every step while the chunk is of the same pieces and the same memory."""
        first = chunk[0][0]
        key = first.work.name, first.number
        pieces = [chunk_slice.piece for chunk_slice, _ in chunk]
        addresses = [one.work.state[part.key].data_ptr() for one, _ in chunk for part in one.piece.parts]
        found = self._chunks.get(key) or self._before.get(key)
        if found is None or found.addresses != addresses or not _same(found.pieces, pieces):
            nbytes = sum(part.nbytes for piece in pieces for part in piece.parts)
            found = _HostChunk(pieces, addresses, self._pairs(chunk), nbytes, {})
        self._chunks[key] = found
        return found

    def _pairs(self, chunk: Sequence[Placed]) -> list[tuple[Tensor, int]]:
        """What is copied: bytes in host memory, and where they go in the buffer. Parts that lie side by side in a slab,
        and so in the buffer, are one copy."""
        slabs = sorted((slab.data_ptr(), slab) for slab in self._slabs) if self._slabs else []
        begins = [begin for begin, _ in slabs]
        runs: list[list[int]] = []  # number of the slab, first and last byte in it, place in the buffer
        pairs: list[tuple[Tensor, int]] = []
        for chunk_slice, at in chunk:
            for part in chunk_slice.piece.parts:
                if not part.nbytes:
                    continue
                tensor = chunk_slice.work.state[part.key]
                number = bisect_right(begins, tensor.data_ptr()) - 1
                first = tensor.data_ptr() - begins[number] + part.offset if number >= 0 else 0
                if number < 0 or first + part.nbytes > slabs[number][1].numel():
                    pairs.append((bytes_of(tensor, part), at + part.at))
                    continue
                last = runs[-1] if runs else None
                gap = first - last[2] if last and last[0] == number else -1
                if last and 0 <= gap < ALIGN and first - last[1] == at + part.at - last[3]:
                    last[2] = first + part.nbytes
                else:
                    runs.append([number, first, first + part.nbytes, at + part.at])
        return [*pairs, *((slabs[number][1][first:last], at) for number, first, last, at in runs)]

    def reserve(self, wanted: Buffers, device: torch.device) -> None:
        self._transfer, self._where, self._device = transfer_of(device), str(device), []
        self._chunks.clear()
        assert self._transfer is not None
        self._device = [self._transfer.device(wanted.nbytes) for _ in range(wanted.number)]

    def streams(self, device: torch.device) -> Streams:
        transfer = transfer_of(device)
        assert transfer is not None
        return transfer.streams()

    def workspace(self) -> list[Line]:
        return buffer_lines(self.buffers, None, self._where) if self._transfer else []

    def tensors(self) -> list[Tensor]:
        return self._device

    def explain(self, device: torch.device) -> str:
        if transfer_of(device) is None:
            return f"state is in the memory of {device}, where the parameters are too: nothing is streamed"
        return (
            f"state is in pinned host memory, streamed through {self.buffers.number} buffers of "
            f"{self.buffers.nbytes:,} bytes on {device}"
        )
