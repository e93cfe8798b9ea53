"""The store of ``@paged``: a file mapped into memory, of which the system or ``resident`` decides what is in memory.

With ``resident`` the parameters whose state fits beside the buffers are stepped where they are mapped, and stay in
memory from step to step; the state of the others is streamed past the page cache, as that of ``@disk``, and what was
mapped of it (to save it, say) is unmapped after every step.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from memopt.core.ledger import Line
from memopt.layout.chunks import ChunkedState, StoreOptions
from memopt.placements.arena import Arena
from memopt.placements.base import Placement, PlacementStore, StepFunction
from memopt.placements.entry import Entry
from memopt.placements.stores.disk import Files
from memopt.placements.workspaces import AHEAD, window

if TYPE_CHECKING:
    from memopt.layout.param_step import Work


@final
class Mapped(PlacementStore):
    def __init__(self, placement: Placement, store_options: StoreOptions) -> None:
        super().__init__(placement)
        self.resident: int | None = store_options.options["resident"]
        self._arena: Arena | None = None
        self._unified: dict[str, int] = {}  # bytes of state in unified memory
        self._files: Files | None = None
        if self.resident is not None:
            options = {"directory": None, "workspace": window(self.resident)}
            self._files = Files(placement, store_options._replace(options=options))

    def in_place(self, device: torch.device) -> bool:
        return self._files is None and sum(self._unified.values()) <= AHEAD

    def allocate(self, name: str, lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
        if device.type == "cuda" and self.resident is None:
            from memopt.placements.stores.unified_memory import unified

            self._unified[name] = sum(line.nbytes for line in lines)
            return unified(lines, device)
        if device.type != "cpu":
            why = "resident= is for parameters in host memory" if device.type == "cuda" else "no such memory is known"
            raise RuntimeError(f"paged: {why}, and {name} is on {device}; use another placement")
        if self._files is not None:
            return self._files.allocate(name, lines, device)
        if self._arena is None:
            self._arena = Arena(None, "paged")
            weakref.finalize(self, self._arena.close)
        entry = Entry.allocate(self._arena, lines, copies=1)
        tensors = entry.tensors()
        entry.release(self._arena)  # when the last of these tensors is gone
        return tensors

    knows_states = True

    def holds(self, name: str, state: Mapping[str, Tensor]) -> bool:
        return self._files is None or self._files.holds(name, state)

    def abandon(self) -> None:
        if self._files is not None:
            self._files.abandon()

    def step(self, works: Sequence[Work], run: StepFunction, chunked: Callable[[Work], ChunkedState]) -> None:
        if self._files is None or self.resident is None:
            self._step_in_place(works, run)
            return
        hot = self._files.first(self.resident - window(self.resident))
        if any(work.groups for work in works):
            hot = set()  # ranks must step in one order
        self._files.resident = hot
        staying = [work for work in works if work.name in hot]
        if staying:
            run(staying)
        self._files.step([work for work in works if work.name not in hot], run, chunked)

    @staticmethod
    def _step_in_place(works: Sequence[Work], run: StepFunction) -> None:
        unified = [work for work in works if work.p.is_cuda]
        if unified:
            from memopt.placements.stores.unified_memory import fetched

            for few in fetched(unified):
                run(few)
        if len(unified) < len(works):
            run([work for work in works if not work.p.is_cuda])

    def prepare(self, chunked: Mapping[str, ChunkedState], device: torch.device, also: bool = False) -> None:
        if self._files is not None:
            self._files.prepare(chunked, device, also)

    def commit(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self._files is not None:
            self._files.commit(states)

    def workspace(self) -> list[Line]:
        return self._files.workspace() if self._files is not None else []

    def tensors(self) -> list[Tensor]:
        return self._files.tensors() if self._files is not None else []

    def explain(self, device: torch.device) -> str:
        if device.type == "cuda":
            large = sum(self._unified.values()) > AHEAD
            return f"state is in CUDA unified memory, paged between {device} and the host by the driver" + (
                f", which is asked for {AHEAD:,} bytes of it at a time before they are stepped" if large else ""
            )
        if self._files is None:
            return (
                f"state is in a file without a name in {tempfile.gettempdir()}, mapped into memory and paged by "
                "the system when memory is short"
            )
        return f"at most {self.resident:,} bytes of state are in memory after a step; {self._files.explain(device)}"

    def close(self, empty: bool = False) -> None:
        if self._files is not None:
            self._files.close()
