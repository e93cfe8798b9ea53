"""The home of ``@cpu``: state in host memory, stepped by the host's processor.

Parameters in host memory are stepped where they are. For those on a device, parameter and gradient come down a few
megabytes at a time into pinned buffers, are stepped there by the CPU kernels, and the parameter goes up again in its
own dtype; copies down, steps and copies up of different rows happen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from memopt.geometry import Rows
from memopt.ledger import Line
from memopt.placements.base import Home, Placement, Run
from memopt.placements.bus import Bus, bus_of
from memopt.placements.cpu import MOST, TARGET, pair_layout
from memopt.placements.disk import buffer_lines
from memopt.placements.leases import Buffers, Held, Piece, Setting, divisible, piece
from memopt.placements.pipeline import Lanes, Operation
from memopt.placements.streamed import Loan, Streamed, bases, bytes_of

if TYPE_CHECKING:
    from memopt.engines.work import Work


@final
class Offloaded(Streamed):
    """The pieces are of parameter and gradient; ``_parts`` are those of the state of the same rows."""

    target, most = TARGET, MOST

    def __init__(self, placement: Placement, setting: Setting) -> None:
        super().__init__(placement, setting.options["workspace"])
        self._host: list[Tensor] = []
        self._where = "cpu"
        self._parts: dict[tuple[str, Rows], Piece] = {}

    def in_place(self, device: torch.device) -> bool:
        return bus_of(device) is None

    def allocate(self, name: str, lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
        return Home.allocate(self, name, lines, torch.device("cpu"))

    def step(self, works: Sequence[Work], run: Run, held: Callable[[Work], Held]) -> None:
        here = [work for work in works if bus_of(work.p.device) is None]
        if here:
            run(here)
        there = [work for work in works if bus_of(work.p.device) is not None]
        for work in there:
            if max(work.p.itemsize, work.g.itemsize) > 4:
                raise RuntimeError(f"cpu: {work.name} is {work.p.dtype} on {work.p.device}; buffers are for 32 bits")

        def pairs(work: Work) -> Held:
            state = held(work)
            whole = state.whole or not divisible(state.rows, state.layout)
            return Held(state.rows, pair_layout(state.rows), whole)

        for work in there:
            state = held(work)
            for part in self._cut(work, pairs):
                self._parts[work.name, part.rows] = piece(work.name, state.rows, part.rows, state.layout)
        super().step(there, run, pairs)

    def prepare(self, held: Mapping[str, Held], device: torch.device) -> None:
        if bus_of(device) is not None:
            pairs = {name: Held(h.rows, pair_layout(h.rows), h.whole or not divisible(h.rows, h.layout))
                     for name, h in held.items()}  # fmt: skip
            super().prepare(pairs, device)

    def chain(self, lease: Sequence[Loan], run: Run, device: torch.device) -> list[Operation]:
        loans = [(loan, loan.on({}), at) for loan, at in bases(lease)]
        down_nbytes = sum(work.p.nbytes + work.g.nbytes for _, work, _ in loans)

        def staged(i: int, loan: Loan, work: Work, at: int) -> tuple[Tensor, Tensor]:
            """Parameter and gradient in the buffer, as wide as they are."""
            p, g = loan.piece.parts
            return tuple(self._host[i][at + part.at : at + part.at + x.nbytes].view(x.dtype).view(x.shape)
                         for part, x in ((p, work.p), (g, work.g)))  # type: ignore[return-value]  # fmt: skip

        def down(i: int) -> None:
            for loan, work, at in loans:
                for here, there in zip(staged(i, loan, work, at), (work.p, work.g), strict=True):
                    here.copy_(there, non_blocking=True)

        def step(i: int) -> None:
            run([self._on_host(loan, work, *staged(i, loan, work, at)) for loan, work, at in loans])

        def up(i: int) -> None:
            for loan, work, at in loans:
                work.p.copy_(staged(i, loan, work, at)[0], non_blocking=True)

        return [Operation("down", down, down_nbytes), Operation("host", step, down_nbytes),
                Operation("up", up, sum(work.p.nbytes for _, work, _ in loans))]  # fmt: skip

    def _on_host(self, loan: Loan, work: Work, p: Tensor, g: Tensor) -> Work:
        whole = loan.work.state
        state = {
            part.key: bytes_of(whole[part.key], part).view(whole[part.key].dtype).view(part.shape)
            for part in self._parts[work.name, work.rows].parts
        }
        return work._replace(p=p, g=g, state={"step": whole["step"], **state})

    def reserve(self, wanted: Buffers, device: torch.device) -> None:
        bus = self._bus(device)
        self._where = str(device)
        self._host = [bus.host(wanted.nbytes) for _ in range(wanted.number)]

    def lanes(self, device: torch.device) -> Lanes:
        return self._bus(device).lanes()

    @staticmethod
    def _bus(device: torch.device) -> Bus:
        bus = bus_of(device)
        assert bus is not None
        return bus

    def workspace(self) -> list[Line]:
        return buffer_lines(self.buffers, "pinned", "cpu")

    def tensors(self) -> list[Tensor]:
        return self._host

    def explain(self, device: torch.device) -> str:
        if bus_of(device) is None:
            return f"state and step are on the {device}, where the parameters are: nothing is copied"
        return (f"state and step are on the host; parameters and gradients of {device} come and go through "
                f"{self.buffers.number} pinned buffers of {self.buffers.nbytes:,} bytes")  # fmt: skip
