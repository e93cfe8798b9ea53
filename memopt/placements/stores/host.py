"""The home of ``@host``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from memopt.core.ledger import Line
from memopt.layout.chunks import Buffers, Held, Part, Setting
from memopt.placements.base import Placement, Run
from memopt.placements.stores.mapped_files import tensors_in
from memopt.placements.stores.streaming import Placed, Streamed, bytes_of, tensor_in
from memopt.placements.transfer.device import Bus, bus_of
from memopt.placements.transfer.pipeline import Lanes, Operation
from memopt.placements.workspaces import HOST_MOST, HOST_TARGET, buffer_lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from memopt.layout.param_step import Work


@final
class Pinned(Streamed):
    target, most = HOST_TARGET, HOST_MOST

    def __init__(self, placement: Placement, setting: Setting) -> None:
        super().__init__(placement, setting.options["workspace"])
        self._device: list[Tensor] = []
        self._where = "cpu"
        self._bus: Bus | None = None

    def in_place(self, device: torch.device) -> bool:
        return bus_of(device) is None

    def allocate(self, name: str, lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
        bus = bus_of(device)
        if bus is None:
            return super().allocate(name, lines, device)
        parts, end = [], 0
        for line in lines:
            parts.append(Part(line.key, line.dtype, line.shape, end, line.nbytes, 0))
            end += -(-line.nbytes // 64) * 64
        return tensors_in(bus.host(end).numpy(), parts) if end else tensors_in(None, parts)

    def step(self, works: Sequence[Work], run: Run, held: Callable[[Work], Held]) -> None:
        on_host = [work for work in works if bus_of(work.p.device) is None]
        if on_host:
            run(on_host)
        super().step([work for work in works if bus_of(work.p.device) is not None], run, held)

    def prepare(self, held: Mapping[str, Held], device: torch.device, also: bool = False) -> None:
        if bus_of(device) is not None:
            super().prepare(held, device, also)

    def chain(self, lease: Sequence[Placed], run: Run, device: torch.device) -> list[Operation]:
        nbytes = sum(part.nbytes for loan, _ in lease for part in loan.piece.parts)
        pairs = [
            (bytes_of(loan.work.state[part.key], part), at + part.at)
            for loan, at in lease
            for part in loan.piece.parts
            if part.nbytes
        ]

        def up(i: int) -> None:
            for there, at in pairs:
                self._device[i][at : at + len(there)].copy_(there, non_blocking=True)

        def step(i: int) -> None:
            run(
                [
                    loan.on(
                        {
                            part.key: tensor_in(self._device[i], at + part.at, part)
                            if part.nbytes
                            else loan.work.state[part.key]
                            for part in loan.piece.parts
                        }
                    )
                    for loan, at in lease
                ]
            )

        def down(i: int) -> None:
            for there, at in pairs:
                there.copy_(self._device[i][at : at + len(there)], non_blocking=True)

        return [Operation("up", up, nbytes), Operation("step", step, nbytes), Operation("down", down, nbytes)]

    def reserve(self, wanted: Buffers, device: torch.device) -> None:
        self._bus, self._where, self._device = bus_of(device), str(device), []
        assert self._bus is not None
        self._device = [self._bus.device(wanted.nbytes) for _ in range(wanted.number)]

    def lanes(self, device: torch.device) -> Lanes:
        bus = bus_of(device)
        assert bus is not None
        return bus.lanes()

    def workspace(self) -> list[Line]:
        return buffer_lines(self.buffers, None, self._where) if self._bus else []

    def tensors(self) -> list[Tensor]:
        return self._device

    def explain(self, device: torch.device) -> str:
        if bus_of(device) is None:
            return f"state is in the memory of {device}, where the parameters are too: nothing is streamed"
        return (
            f"state is in pinned host memory, streamed through {self.buffers.number} buffers of "
            f"{self.buffers.nbytes:,} bytes on {device}"
        )
