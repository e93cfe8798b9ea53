"""A device that exists on a clock only: lanes with fixed latencies, whose operations take effect when the clock says.

Operations are queued, given a time by what they wait for, and executed in the order of the time at which they begin. A
schedule that lets a buffer be overwritten too early therefore gives wrong numbers, as it would on a card.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Op(NamedTuple):
    lane: str
    begin: float
    end: float
    number: int  # in the order in which they were given
    run: Callable[[], None]


class Lanes:
    """``costs``: lane -> (seconds, seconds per byte)."""

    def __init__(self, costs: dict[str, tuple[float, float]]) -> None:
        self.costs = costs
        self.free: dict[str, float] = {}
        self.queue: list[Op] = []
        self.trace: list[Op] = []

    def submit(self, lane: str, run: Callable[[], None], after: Sequence[Op], nbytes: int) -> Op:
        fixed, per_byte = self.costs.get(lane, (1.0, 0.0))
        begin = max([self.free.get(lane, 0.0), *(op.end for op in after)])
        op = Op(lane, begin, begin + fixed + per_byte * nbytes, len(self.trace), run)
        self.free[lane] = op.end
        self.queue.append(op)
        self.trace.append(op)
        return op

    def finish(self) -> None:
        queue, self.queue = self.queue, []
        for op in sorted(queue, key=lambda op: (op.begin, op.number)):
            op.run()

    def of(self, lane: str) -> list[Op]:
        return [op for op in self.trace if op.lane == lane]

    @property
    def busy(self) -> dict[str, float]:
        """Seconds that each lane worked."""
        return {lane: sum(op.end - op.begin for op in self.of(lane)) for lane in {op.lane for op in self.trace}}

    def timeline(self) -> str:
        """Lanes below each other, time from left to right: what a profiler would show."""
        width = round(max(op.end for op in self.trace))
        rows = []
        for lane in dict.fromkeys(op.lane for op in self.trace):
            row = [" "] * width
            for i, op in enumerate(self.of(lane)):
                for t in range(round(op.begin), round(op.end)):
                    row[t] = str(i % 10)
            rows.append(f"{lane:<6}|{''.join(row)}|")
        return "\n".join(rows)


class Bus:
    """The memory of the simulated device is ordinary memory, filled with rubbish where it is fresh."""

    def __init__(self, device: torch.device, costs: dict[str, tuple[float, float]] | None = None) -> None:
        self.runs: list[Lanes] = []
        self._costs = costs or {}

    def host(self, nbytes: int) -> Tensor:
        return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)[:nbytes]

    def device(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 171, dtype=torch.uint8)

    def lanes(self) -> Lanes:
        self.runs.append(Lanes(self._costs))
        return self.runs[-1]
