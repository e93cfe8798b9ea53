"""A device that exists on a clock only: streams with fixed latencies, whose operations take effect when the clock says.

Operations are queued, given a time by what they wait for, and executed in the order of the time at which they begin. A
schedule that lets a buffer be overwritten too early therefore gives wrong numbers, as it would on a card.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.placements.transfer.streams import Threads


class Op:
    def __init__(self, streams: Streams, stream: str, begin: float, end: float, run: Callable[[], None] | None) -> None:
        self.streams, self.stream, self.begin, self.end, self.run = streams, stream, begin, end, run
        self.number = len(streams.trace)  # in the order in which they were given
        self.error: BaseException | None = None

    def result(self) -> None:
        """Whoever asks has waited until then."""
        self.streams.wait_for([self])
        if self.error is not None:
            raise self.error

    def done(self) -> bool:
        return self.end <= self.streams.now


class Streams:
    """``costs``: stream -> (seconds, seconds per byte). ``now`` is the time of the thread that submits: nothing that it
    submits begins earlier."""

    def __init__(self, costs: dict[str, tuple[float, float]]) -> None:
        self.costs = costs
        self.free: dict[str, float] = {}
        self.queue: list[Op] = []
        self.trace: list[Op] = []
        self.now = 0.0

    def submit(self, stream: str, run: Callable[[], None], after: Sequence[Op], nbytes: int) -> Op:
        fixed, per_byte = self.costs.get(stream, (1.0, 0.0))
        begin = max([self.now, self.free.get(stream, 0.0), *(op.end for op in after)])
        op = Op(self, stream, begin, begin + fixed + per_byte * nbytes, run)
        self.free[stream] = op.end
        self.queue.append(op)
        self.trace.append(op)
        return op

    def submit_thread(self, stream: str, run: Callable[[], None], after: Sequence[Op], nbytes: int) -> Op:
        """An operation that may submit operations itself, and ends when those have that it waits for."""
        outer = self.now
        op = self.submit(stream, lambda: None, after, nbytes)
        self.wait_for([*after, op])
        self.now = op.begin
        try:
            run()
        except BaseException as error:  # it is the thread's until somebody asks
            op.error = error
        op.end = self.free[stream] = max(op.end, self.now)
        self.now = outer
        return op

    def wait_for(self, ops: Sequence[Op]) -> None:
        """The submitting thread waits; what begins until then takes effect."""
        last = max((op.begin for op in ops), default=-1.0)
        due = sorted((op for op in self.queue if op.begin <= last), key=lambda op: (op.begin, op.number))
        self.queue = [op for op in self.queue if op.begin > last]
        for op in due:
            run, op.run = op.run, None  # what it held may be freed
            assert run is not None
            run()
        self.now = max([self.now, *(op.end for op in ops)])

    def synchronize(self) -> None:
        self.wait_for(list(self.queue))

    def of(self, stream: str) -> list[Op]:
        return [op for op in self.trace if op.stream == stream]

    @property
    def busy(self) -> dict[str, float]:
        """Seconds that each stream worked."""
        return {stream: sum(op.end - op.begin for op in self.of(stream)) for stream in {op.stream for op in self.trace}}

    def timeline(self) -> str:
        """Streams below each other, time from left to right: what a profiler would show."""
        width = round(max(op.end for op in self.trace))
        rows = []
        for stream in dict.fromkeys(op.stream for op in self.trace):
            row = [" "] * width
            for i, op in enumerate(self.of(stream)):
                for t in range(round(op.begin), round(op.end)):
                    row[t] = str(i % 10)
            rows.append(f"{stream:<6}|{''.join(row)}|")
        return "\n".join(rows)


class Part:
    """Some streams of a clock that is shared: ``synchronize`` waits for what was submitted here."""

    def __init__(self, clock: Streams, floor: float, thread: bool = False) -> None:
        self.clock, self.floor, self.ops = clock, floor, []
        self._submit = clock.submit_thread if thread else clock.submit

    def submit(self, stream: str, run: Callable[[], None], after: Sequence[Op], nbytes: int) -> Op:
        before = Op(self.clock, "", 0.0, self.floor, None)
        self.ops.append(self._submit(stream, run, [*after, before], nbytes))
        return self.ops[-1]

    def synchronize(self) -> None:
        ops, self.ops = self.ops, []
        self.clock.wait_for(ops)
        for op in ops:
            op.result()


class DeviceTransfer:
    """The memory of the simulated device is ordinary memory, filled with rubbish where it is fresh. Each call of
    ``streams`` begins a clock of its own, unless ``clock`` is given: then the device computes on its stream
    ``backward``, which whoever drives it submits, and everything is on one time line."""

    def __init__(
        self, device: torch.device, costs: dict[str, tuple[float, float]] | None = None, clock: Streams | None = None
    ) -> None:
        self.runs: list[Streams] = []
        self.clock = clock
        self._costs = costs or {}
        self._inside = False  # the thread beside the caller's is what submits
        self.pinned = 0

    def host(self, nbytes: int) -> Tensor:
        self.pinned += nbytes
        return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)[:nbytes]

    def device(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 171, dtype=torch.uint8)

    def streams(self):
        if self.clock is not None:
            return Part(self.clock, 0.0 if self._inside else self.clock.free.get("backward", 0.0))
        self.runs.append(Streams(self._costs))
        return self.runs[-1]

    def gradient_offload(self):
        if self.clock is None:
            self.clock = Streams(self._costs)
        return Part(self.clock, self.clock.free.get("backward", 0.0))

    def apart(self):
        assert self.clock is not None
        transfer, part = self, Part(self.clock, 0.0, thread=True)

        class Thread:
            def submit(self, stream, run, after, nbytes):
                def inside() -> None:
                    transfer._inside = True
                    try:
                        run()
                    finally:
                        transfer._inside = False

                return part.submit(stream, inside, after, nbytes)

            def synchronize(self):
                part.synchronize()

        return Thread()


class ThreadedBus:
    """Memory of the CPU as a device's, and threads that copy, slowly: what a schedule does not wait for is missing."""

    def __init__(self, beside: float = 0.0) -> None:
        self.beside = beside  # seconds by which what runs beside the caller is late
        self._copiers = {name: Threads({name: 1}) for name in ("up", "down", "arriving")}

    def host(self, nbytes: int) -> Tensor:
        return torch.full((max(nbytes, 1),), 171, dtype=torch.uint8)[:nbytes]

    def device(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 171, dtype=torch.uint8)

    def streams(self):
        return Copying(self._copiers)

    def gradient_offload(self):
        return Copying({"down": self._copiers["arriving"]})

    def apart(self):
        threads, submit = Threads({"apart": 1}), Threads.submit

        def late(stream: str, run: Callable[[], None], after: Sequence[Any], nbytes: int) -> Any:
            def inside() -> None:
                time.sleep(self.beside)
                run()

            return submit(threads, stream, inside, after, nbytes)

        threads.submit = late  # type: ignore[method-assign]
        return threads


class Copying:
    """Streams whose operations are made by a thread each, and else by the caller."""

    def __init__(self, threads: dict[str, Threads]) -> None:
        self.threads, self.own = threads, Threads({})
        self.pending: list[Any] = []

    def submit(self, stream: str, run: Callable[[], None], after: Sequence[Any], nbytes: int) -> Any:
        if stream not in self.threads:
            return self.own.submit(stream, run, after, nbytes)

        @torch.no_grad()
        def late() -> None:
            time.sleep(0.001)
            run()

        before = list(after)
        name = next(iter(self.threads[stream]._pools))
        self.pending.append(self.threads[stream].submit(name, late, before, nbytes))
        return self.pending[-1]

    def synchronize(self) -> None:
        pending, self.pending = self.pending, []
        for event in pending:
            event.result()


class PageBus(ThreadedBus):
    """Buffers begin at pages, as pinned memory does: files are read into them directly."""

    def host(self, nbytes: int) -> Tensor:
        return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)[:nbytes]
