"""The store of ``@cpu``: state in host memory, stepped by the host's processor.

Parameters in host memory are stepped where they are. For those on a device, parameter and gradient come down a few
megabytes at a time into pinned buffers, are stepped there by the CPU kernels, and the parameter goes up again in its
own dtype; copies down, steps and copies up of different rows happen at once. Gradients come down in ``backward()``, as
many as the buffers hold (:mod:`memopt.placements.gradients.prefetch`). With ``offload_gradients=True`` all of them do,
into room of their own, and leave the device (:mod:`memopt.placements.gradients.offload`); where they are released the
step runs beside ``backward()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from memopt.core.ledger import Line
from memopt.layout.chunks import Buffers, ChunkedState, Part, Piece, StoreOptions, piece
from memopt.placements.base import E, Placement, PlacementStore, StepFunction
from memopt.placements.gradients.hooks import ranks
from memopt.placements.gradients.offload import GradientOffload, OffloadedGradient
from memopt.placements.gradients.prefetch import GradientPrefetch
from memopt.placements.host_cores import of_this_rank, taken
from memopt.placements.stores.streaming import ChunkSlice, Placed, Streamed, bytes_of
from memopt.placements.transfer.device import DeviceTransfer, transfer_of
from memopt.placements.transfer.pipeline import Operation, Streams
from memopt.placements.workspaces import CPU_TARGET, buffer_lines, gradient_line, most_of, staging
from memopt.spec.placement_options import PREFETCH

if TYPE_CHECKING:
    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work


#: What is said of the option for parameters in host memory.
IDLE = "offload_gradients has nothing to do"


@final
class Offloaded(Streamed):
    """The pieces are of the parameter and of the gradient if it is on the device; ``_parts`` are those of the state of
    the same rows."""

    target = CPU_TARGET

    def __init__(self, placement: Placement, store_options: StoreOptions) -> None:
        super().__init__(placement, store_options.options["workspace"])
        self.most = most_of(store_options.options)
        self._host: list[Tensor] = []
        self._where = "cpu"
        self._parts: dict[str, tuple[ParamLayout, list[Piece]]] = {}
        gradients = store_options.options["offload_gradients"]
        self._gradient_offload = GradientOffload(self._buffers_ready, self.nbytes) if gradients is True else None
        self._prefetch = GradientPrefetch(self._cuts) if gradients == PREFETCH else None
        self.takes_params = gradients is not False
        #: Of this rank; a variable that cannot be read is refused here.
        self._cores = of_this_rank()
        self._begun: set[tuple[str, int]] = set()  # parameters and numbers of pieces whose gradient is in its place
        self._watched: dict[str, tuple[Tensor, ChunkedState, bool]] = {}

    def in_place(self, device: torch.device) -> bool:
        return transfer_of(device) is None

    def allocate(self, name: str, lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
        return PlacementStore.allocate(self, name, lines, torch.device("cpu"))

    # Gradients ---------------------------------------------------------------------------------------------------

    def register_params(self, parameters: Mapping[str, tuple[Tensor, ChunkedState, bool]]) -> None:
        self._watched = dict(parameters)
        if self._prefetch is not None:
            self._prefetch.hook(self._prefetched())
        if self._gradient_offload is None:
            return
        self._gradient_offload.hook({name: p for name, (p, _, wanted) in parameters.items() if wanted})
        for name in [n for n in self._gradient_offload.offloaded if n not in parameters]:
            self._gradient_offload.offloaded.pop(name).give_back()

    def prefetch_grad(self, name: str, p: Tensor) -> None:
        if self._gradient_offload is not None:
            self._gradient_offload.take_new(name, p)

    def submit_step(self, name: str, p: Tensor, entry: E, step: Callable[[list[tuple[E, Tensor]]], None]) -> bool:
        if self._gradient_offload is None or transfer_of(p.device) is None:
            return False
        if ranks() > 1:  # a step may talk to the other ranks, which only one thread can do in the same order on all
            self._gradient_offload.take_new(name, p)
            return False
        self._gradient_offload.submit_step(name, p, entry, step)
        return True

    def synchronize(self) -> None:
        if self._gradient_offload is not None:
            self._gradient_offload.synchronize()

    def _buffers_ready(self) -> Sequence[Tensor]:
        """Gradients are coming: what they and the step need is allocated, as it is priced."""
        if not self._host:
            self._prepare_watched()
        return self._host

    def _prefetched(self) -> dict[str, Tensor]:
        """Parameters on a device that have stepped, and whose gradients stay in ``backward()``."""
        return {name: p for name, (p, _, wanted) in self._watched.items() if wanted and name in self._cuts}

    def _prepare_watched(self) -> None:
        by_device: dict[torch.device, dict[str, ChunkedState]] = {}
        for name, (p, chunked, _) in self._watched.items():
            if p.requires_grad:
                by_device.setdefault(p.device, {})[name] = chunked
        for device, mine in by_device.items():
            self.prepare(mine, device, also=True)

    # The step ----------------------------------------------------------------------------------------------------

    def step(self, works: Sequence[Work], run: StepFunction, chunked: Callable[[Work], ChunkedState]) -> None:
        here = [work for work in works if transfer_of(work.p.device) is None]
        if here:
            run(here)
        there = [work for work in works if transfer_of(work.p.device) is not None]
        for work in there:
            if max(work.p.itemsize, work.g.itemsize) > 4:
                raise RuntimeError(f"cpu: {work.name} is {work.p.dtype} on {work.p.device}; buffers are for 32 bits")
        self._begun = set()
        if self._gradient_offload is not None:
            self._gradient_offload.free_buffers()
        if self._prefetch is not None and any(work.groups for work in there):
            self._prefetch.forget()

        def staged(work: Work) -> ChunkedState:
            return staging(chunked(work), self._gradient_offload is not None)

        for work in there:
            before = self._parts.get(work.name)
            if before is None or before[0] is not work.layout:
                state, cut = chunked(work), self._cut(work, staged)[1]
                parts = [piece(work.name, state.rows, part.rows, state.layout) for part in cut]
                self._parts[work.name] = work.layout, parts
        super().step(there, run, staged)
        if self._prefetch is not None and there:
            self._prefetch.ready(there[0].p.device, self._host, self._prefetched())

    def begun(self, slices: Sequence[ChunkSlice], device: torch.device) -> list[list[Placed]]:
        """Those whose gradients came down in ``backward()``; their buffers are the first of all from now on."""
        if self._prefetch is None or device != self._prefetch.device:
            return []
        chunks = self._prefetch.claim(slices)
        full = [i for i, chunk in enumerate(chunks) if chunk]
        self._host = [*(self._host[i] for i in full), *(x for i, x in enumerate(self._host) if i not in full)]
        self._begun = {(chunk_slice.work.name, chunk_slice.number) for chunk in chunks for chunk_slice, _ in chunk}
        return [chunks[i] for i in full]

    def prepare(self, chunked: Mapping[str, ChunkedState], device: torch.device, also: bool = False) -> None:
        transfer = transfer_of(device)
        if transfer is None:
            return
        with taken(self._cores):  # memory is nearest to whoever asks for it
            if self._gradient_offload is not None:
                for name, one in chunked.items():
                    self._gradient_offload.allocate(
                        name, getattr(torch, one.dtype), torch.Size(one.rows.local_shape), transfer
                    )
            staged = {n: staging(h, self._gradient_offload is not None) for n, h in chunked.items()}
            super().prepare(staged, device, also)

    def chain(self, chunk: Sequence[Placed], run: StepFunction, device: torch.device) -> list[Operation]:
        on_buffers = [(chunk_slice, chunk_slice.on({}), at) for chunk_slice, at in chunk]
        there = [
            self._gradient_offload is not None or (chunk_slice.work.name, chunk_slice.number) in self._begun
            for chunk_slice, _ in chunk
        ]
        down_nbytes = sum(w.p.nbytes + (0 if t else w.g.nbytes) for (_, w, _), t in zip(on_buffers, there, strict=True))

        staged: list[list[Tensor]] = []

        def stage(i: int) -> None:
            """Where they are in the buffer: the parameter, and the gradient behind it unless that is in host memory; as
            wide as they are."""
            for chunk_slice, work, at in on_buffers:
                both = zip(chunk_slice.piece.parts, (work.p, work.g), strict=False)
                staged.append([self._as_wide(i, at + part.at, x) for part, x in both])

        def down(i: int) -> None:
            stage(i)
            into = [p for p, *_ in staged]
            what = [work.p for _, work, _ in on_buffers]
            for (_, *g), (_, work, _), is_there in zip(staged, on_buffers, there, strict=True):
                if not is_there:
                    into.append(g[0])
                    what.append(work.g)
            torch._foreach_copy_(into, what, non_blocking=True)

        def step(i: int) -> None:
            run(
                [
                    self._on_host(chunk_slice, work, p, g[0] if g else work.g)
                    for (chunk_slice, work, _), (p, *g) in zip(on_buffers, staged, strict=True)
                ]
            )

        def up(i: int) -> None:
            torch._foreach_copy_([work.p for _, work, _ in on_buffers], [p for p, *_ in staged], non_blocking=True)

        return [
            Operation("down", down, down_nbytes),
            Operation("host", step, down_nbytes),
            Operation("up", up, sum(work.p.nbytes for _, work, _ in on_buffers)),
        ]

    def _on_host(self, chunk_slice: ChunkSlice, work: Work, p: Tensor, g: Tensor) -> Work:
        whole = chunk_slice.work.state
        if chunk_slice.layout is chunk_slice.work.layout:
            return work._replace(p=p, g=g, state=whole)
        state = {
            part.key: bytes_of(whole[part.key], part).view(whole[part.key].dtype).view(part.shape)
            for part in self._parts[work.name][1][chunk_slice.number].parts
        }
        return work._replace(p=p, g=g, state={"step": whole["step"], **state})

    def _as_wide(self, i: int, at: int, x: Tensor) -> Tensor:
        part = Part("", str(x.dtype).removeprefix("torch."), x.shape, 0, x.nbytes, 0)
        return self.in_buffer(self._host[i], at, part)

    def reserve(self, wanted: Buffers, device: torch.device) -> None:
        if self._gradient_offload is not None:
            self._gradient_offload.free_buffers()
        if self._prefetch is not None:
            self._prefetch.forget()
        transfer = self._transfer(device)
        self._where, self._host = str(device), []
        self._host = [transfer.host(wanted.nbytes) for _ in range(wanted.number)]

    def streams(self, device: torch.device) -> Streams:
        return self._transfer(device).streams()

    @staticmethod
    def _transfer(device: torch.device) -> DeviceTransfer:
        transfer = transfer_of(device)
        assert transfer is not None
        return transfer

    # Looking -----------------------------------------------------------------------------------------------------

    def workspace(self) -> list[Line]:
        nbytes = sum(one.host.nbytes for one in self._offloaded())
        return [*buffer_lines(self.buffers, "pinned", "cpu"), *gradient_line(nbytes)]

    def tensors(self) -> list[Tensor]:
        return [*self._host, *(one.memory for one in self._offloaded())]

    def _offloaded(self) -> Iterable[OffloadedGradient]:
        return self._gradient_offload.offloaded.values() if self._gradient_offload is not None else ()

    def explain(self, device: torch.device) -> str:
        if transfer_of(device) is None:
            return f"state and step are on the {device}, where the parameters are: nothing is copied" + (
                f"; gradients too: {IDLE}" if self._gradient_offload else ""
            )
        what = "parameters" if self._gradient_offload else "parameters and gradients"
        through = f"{self.buffers.number} pinned buffers of {self.buffers.nbytes:,} bytes"
        return f"state and step are on the host; {what} of {device} come and go through {through}; {self._gradients()}"

    def _gradients(self) -> str:
        if self._gradient_offload is not None:
            return "gradients go to pinned memory in backward(), and leave the device"
        return self._prefetch.explain() if self._prefetch is not None else "gradients come down in the step"

    def close(self, empty: bool = False) -> None:
        if self._gradient_offload is not None:
            self._gradient_offload.close()
        if self._prefetch is not None:
            self._prefetch.close()
