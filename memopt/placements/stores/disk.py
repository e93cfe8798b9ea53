"""The store of ``@disk``: state in a file, streamed, and with a directory committed step by step.

In a directory each parameter has room for its state twice. A step reads one copy and writes the other; when all of it
is on the disk, a record is replaced (:mod:`memopt.placements.stores.atomic_record`) that says which copies are the
state, after how many steps, and their checksums. Until then the record speaks of the copies that were read. So there is
nothing to undo after a crash and nothing is written twice: the price is room on the disk, not time.
"""

from __future__ import annotations

import mmap
import weakref
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from operator import is_
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from memopt.core.host_memory import bytes_view
from memopt.core.ledger import Line
from memopt.core.user_warning import warn
from memopt.kernels import Streaming
from memopt.layout.chunks import PAGE, Buffers, ChunkedState, StoreOptions, pack
from memopt.placements.arena import Arena
from memopt.placements.base import Placement, Restored, StepFunction
from memopt.placements.entry import ChunkMoves, ChunkPart, Entry, Room, fetched, pages_of, rewriting, written
from memopt.placements.stores.durable_directory import Directory
from memopt.placements.stores.streaming import ChunkSlice, Placed, Streamed, placed
from memopt.placements.transfer.device import DeviceTransfer, transfer_of
from memopt.placements.transfer.pipeline import Operation, Streams, run_chains_on_host
from memopt.placements.transfer.streams import Threads
from memopt.placements.workspaces import DISK_MOST, DISK_TARGET, buffer_lines, spare_line

if TYPE_CHECKING:
    from memopt.layout.param_step import Work

#: Threads that read and write; a disk needs several requests at once to be as fast as it can.
WORKERS = {"read": 2, "write": 2}


@final
class Files(Streamed):
    """With a directory ``rewritable`` is False: what is committed is never written over."""

    target, most = DISK_TARGET, DISK_MOST

    def __init__(self, placement: Placement, store_options: StoreOptions) -> None:
        super().__init__(placement, store_options.options["workspace"])
        path = store_options.options["directory"]
        self.directory = Directory(path, store_options) if path else None
        self.arena = self.directory.arena if self.directory else Arena(None, placement.name)
        self.copyable = self.rewritable = self.directory is None
        self.entries: dict[str, Entry] = {}
        self._room: Room | None = None  # for those that are allocated next
        self._host: list[Tensor] = []
        self._device: list[Tensor] = []
        self._views: list[memoryview] = []
        self._transfer: DeviceTransfer | None = None
        self._where = "cpu"
        self._threads = Threads(WORKERS)
        self.resident: set[str] = set()  # parameters whose mapped state is to stay in memory
        self._finalizer = weakref.finalize(self, _close, [self._threads, self.directory or self.arena])

    # Allocation ------------------------------------------------------------------------------------------------

    def allocate(self, name: str, lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
        entry = Entry.allocate(self.arena, lines, copies=2 if self.directory else 1, room=self._room)
        self._retire(name)  # not before there is room for the other
        self.entries[name] = entry
        return entry.tensors()

    def preallocate(self, wanted: Sequence[tuple[str, Sequence[Line]]]) -> None:
        if self._room:
            self._room.close()
        new = [lines for name, lines in wanted if self.directory and name not in self.directory.pending]
        self._room = Room(self.arena, sum(map(pages_of, new)), copies=2) if new else None

    knows_states = streams_alike = preallocates = True

    def holds(self, name: str, state: Mapping[str, Tensor]) -> bool:
        tensors = self.entries[name].tensors() if name in self.entries else None
        if tensors is None or tensors.keys() != state.keys() - {"step"}:  # moments have been switched on or off
            return False
        return all(state[key].data_ptr() == t.data_ptr() for key, t in tensors.items() if t.numel())

    def restore(self, name: str, lines: Sequence[Line]) -> Restored | None:
        if self.directory is None or name not in self.directory.pending:
            return None
        entry, step = self.directory.take(name, lines)
        self.entries[name] = entry
        if not self.directory.announced:
            self.directory.announced = True
            warn(
                f"disk: state of earlier steps is in {self.directory.path} and is gone on with; {name} has "
                f"stepped {step:.0f} times{self.directory.note}. Remove the directory to begin anew"
            )
        return entry.tensors(), step

    def validate_existing(self, lines: Callable[[], Mapping[str, Sequence[Line]]]) -> None:
        if self.directory and self.directory.pending:
            self.directory.validate_existing(lines())

    @property
    def durable(self) -> Directory | None:
        return self.directory

    def _retire(self, name: str) -> None:
        """The state of this parameter is another from now on; what was committed is kept until the next commit."""
        old = self.entries.pop(name, None)
        if old is not None and self.directory:
            self.directory.retired.append(old)
        elif old is not None:
            old.release(self.arena)
        if self.directory:
            self.directory.forget(name)

    # The step --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.arena.check()
        if self.directory:
            self.directory.check()

    def step(self, works: Sequence[Work], run: StepFunction, chunked: Callable[[Work], ChunkedState]) -> None:
        if self.directory:
            self.directory.wait()
        with rewriting([(self.entries[work.name], work.state) for work in works]):
            super().step(works, run, chunked)
        self._unmap()

    def _unmap(self) -> None:
        for name, entry in self.entries.items():
            if name not in self.resident:
                entry.unmap()

    def abandon(self) -> None:
        super().abandon()
        self._threads.abandon()

    def first(self, nbytes: int) -> set[str]:
        """The parameters, in the order of their allocation, whose state together is at most so many bytes."""
        ends = accumulate(entry.nbytes for entry in self.entries.values())
        return {name for name, end in zip(self.entries, ends, strict=True) if end <= nbytes}

    def chain(self, chunk: Sequence[Placed], run: StepFunction, device: torch.device) -> list[Operation]:
        nbytes = sum(part.nbytes for chunk_slice, _ in chunk for part in chunk_slice.piece.parts)
        places = self._places(chunk)

        def read(i: int) -> None:
            self._move(self.arena.read, i, fetched(places))

        def write(i: int) -> None:
            self._write(i, places, written(places))

        def step(i: int) -> None:
            memory = self._device if self._transfer else self._host
            run([chunk_slice.on(self._state(chunk_slice, memory[i], base)) for chunk_slice, base in chunk])

        def up(i: int) -> None:
            self._device[i].copy_(self._host[i], non_blocking=True)

        def down(i: int) -> None:
            self._host[i].copy_(self._device[i], non_blocking=True)

        reading, writing = Operation("read", read, nbytes), Operation("write", write, nbytes)
        stepping = Operation("step", step, nbytes)
        if self._transfer is None:
            return [reading, stepping, writing]
        return [reading, Operation("up", up, nbytes), stepping, Operation("down", down, nbytes), writing]

    def streaming(self, works: Sequence[Work], chunked: Callable[[Work], ChunkedState]) -> Streaming | None:
        slices = self._slices(works, chunked)
        self._fit(works[0].p.device)
        if not self._host or any(work.groups or not work.p.is_cpu for work in works):
            return None  # a step waits for other ranks, or for a card
        host, names = self._host, [work.name for work in works]
        entries = [self.entries[name] for name in names]
        chunks = [placed(chunk) for chunk in pack([one for one in slices if one.nbytes], self.buffers.nbytes)]
        moves = [ChunkMoves(self._places(chunk)) for chunk in chunks]
        states = [(entry, work.state) for entry, work in zip(entries, works, strict=True)]
        on_buffers = []
        for i, chunk in enumerate(chunks):
            on_buffers.append([one.on(self._state(one, host[i % len(host)], base)) for one, base in chunk])
        empty = [one.on(dict(one.work.state)) for one in slices if not one.nbytes]
        on_buffers += [empty] if empty else []

        def same() -> bool:  # the list of buffers is another where they were made anew
            self.check()
            return self._host is host and all(map(is_, map(self.entries.get, names), entries))

        def chain(i: int, step: Callable[[int], None]) -> list[Operation]:
            (reads, writes), one = moves[i].now(), moves[i]
            return [
                Operation("read", lambda buffer: self._move(self.arena.read, buffer, reads), one.nbytes),
                Operation("step", lambda _: step(i), one.nbytes),
                Operation("write", lambda buffer: self._write(buffer, one.places, writes), one.nbytes),
            ]

        def run(step: Callable[[int], None], wanted: Collection[int]) -> None:
            idle = [Operation("step", lambda _: None)]  # a chunk that is left out keeps its place among the buffers
            chains = [chain(i, step) if i in wanted else idle for i in range(len(chunks))]
            with rewriting(states):
                run_chains_on_host(chains, self._threads, len(host))
            if empty and len(chunks) in wanted:
                step(len(chunks))
            if not self.arena.direct:  # a direct write takes from memory what stands where it writes
                self._unmap()

        return Streaming(on_buffers, run, same, moves=self.directory is not None)

    def _write(self, i: int, places: Sequence[ChunkPart], runs: Sequence[tuple[int, int, int]]) -> None:
        if self.directory:
            for entry, part, at, offset in places:
                view = self._views[i][at + offset % PAGE :][: part.nbytes]
                entry.note_written(part, zlib.crc32(view))
        self._move(self.arena.write, i, runs)

    def _move(self, act: Callable[[memoryview, int], None], i: int, found: Sequence[tuple[int, int, int]]) -> None:
        for at, offset, size in found:
            act(self._views[i][at : at + size], offset)

    def _places(self, chunk: Sequence[Placed]) -> list[ChunkPart]:
        """Where each part of the chunk is in the buffer, and in its entry's copy."""
        return [
            (entry, part, base + part.at, entry.offsets[part.key] + part.offset)
            for chunk_slice, base in chunk
            for entry in [self.entries[chunk_slice.work.name]]
            for part in chunk_slice.piece.parts
            if part.nbytes
        ]

    def _state(self, chunk_slice: ChunkSlice, memory: Tensor, base: int) -> dict[str, Tensor]:
        offsets = self.entries[chunk_slice.work.name].offsets
        return {
            part.key: self.in_buffer(memory, base + part.at + (offsets[part.key] + part.offset) % PAGE, part)
            if part.nbytes
            else chunk_slice.work.state[part.key]
            for part in chunk_slice.piece.parts
        }

    def reserve(self, wanted: Buffers, device: torch.device) -> None:
        self._views, self._host, self._device = [], [], []
        self._transfer, self._where = transfer_of(device), str(device)
        for _ in range(wanted.number):
            if self._transfer:
                self._host.append(self._transfer.host(wanted.nbytes))
                self._device.append(self._transfer.device(wanted.nbytes))
            else:
                self._host.append(torch.frombuffer(mmap.mmap(-1, wanted.nbytes), dtype=torch.uint8))
        self._views = [bytes_view(tensor) for tensor in self._host]

    def streams(self, device: torch.device) -> Streams:
        return self._transfer.streams() if self._transfer else self._threads

    # What survives ---------------------------------------------------------------------------------------------

    def commit(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name in [n for n in self.entries if n not in states]:
            self._retire(name)
        if self.directory:
            self.directory.commit(self.entries, {name: float(states[name]["step"]) for name in self.entries})

    def workspace(self) -> list[Line]:
        nbytes = sum(entry.state_nbytes for entry in self.entries.values())
        return [
            *buffer_lines(self.buffers, "pinned" if self._transfer else "cpu", self._where),
            *(spare_line(nbytes) if self.directory and nbytes else []),
        ]

    def tensors(self) -> list[Tensor]:
        return [*self._host, *self._device]

    def explain(self, device: torch.device) -> str:
        by = "direct reads and writes (O_DIRECT)"
        if not self.arena.direct:
            by = "reads and writes through the page cache, told not to keep them: the file system has no O_DIRECT"
        size = f"{self.buffers.number} buffers of {self.buffers.nbytes:,} bytes"
        if self.directory is None:
            return (
                f"state is in a file without a name in {self.arena.directory}, which ends with this process "
                f"(directory= keeps it); {by}, {size}"
            )
        return f"state is in {self.directory.path}, committed after every step; {by}, {size}"

    def close(self, empty: bool = False) -> None:
        if empty and self.directory and self._finalizer.alive:
            self.directory.clear()
        self._finalizer()


def _close(things: list[Threads | Directory | Arena]) -> None:
    for thing in things:
        thing.close()
