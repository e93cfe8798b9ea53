"""Gradients that go to the host as they become ready, for the store of ``@cpu`` with ``offload_gradients=True``.

A hook on each parameter hands its gradient to the device transfer in the middle of ``backward()``, which goes on
meanwhile; the gradient's memory is the device's again when the copy has been made. What stands in ``p.grad`` then says
so (:mod:`memopt.placements.gradients.host_grad`). A further backward pass adds: its gradient comes down through the
buffers that steps use, a piece at a time, and a thread adds the pieces to what is there, in the order and with the
rounding with which autograd would have on the device.

Under fully_shard the hook is called with the shard that the ranks have reduced; what stands for it is the local tensor
of the DTensor in ``p.grad``.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from memopt.partitions.dtensor import is_dtensor
from memopt.placements.gradients.checks import check_gradient
from memopt.placements.gradients.hooks import Hooks, averaged, leave, ranks
from memopt.placements.gradients.host_grad import HostGradient, local_gradient, replace_local
from memopt.placements.transfer.device import DeviceTransfer, transfer_of
from memopt.placements.transfer.pipeline import Event

if TYPE_CHECKING:
    from memopt.placements.transfer.pipeline import Streams


@final
class OffloadedGradient:
    """Room for one parameter's gradient in pinned host memory, and what was last done to it."""

    def __init__(
        self, gradient_offload: GradientOffload, name: str, memory: Tensor, dtype: torch.dtype, shape: torch.Size
    ) -> None:
        self.name = name
        self.memory = memory  # uint8 [bytes]
        self.host = memory.view(dtype).view(shape)
        self.last: Event | None = None
        self.reader: Event | None = None  # a step beside backward(), until it has been waited for
        # Weak, for no collector sees through p.grad: p -> what stands there -> this -> p would never be garbage.
        self._p: weakref.ref[Tensor] | None = None
        self._stands: weakref.ref[HostGradient] | None = None
        self._gradient_offload = weakref.ref(gradient_offload)

    def stand_in(self, p: Tensor, g: Tensor) -> None:
        """Replace ``p.grad``, of which ``g`` is what is here."""
        host_gradient = HostGradient(self, g)
        self._p, self._stands = weakref.ref(p), weakref.ref(host_gradient)
        replace_local(p, host_gradient)

    def give_back(self) -> None:
        """Put the gradient where it was, if that is still waited for."""
        p = self._p() if self._p is not None else None
        stands = local_gradient(p) if p is not None else None
        if p is not None and isinstance(stands, HostGradient) and stands.gradient is self:
            replace_local(p, self.here(stands).to(p.device, copy=True))

    def wait(self) -> Tensor:
        """The gradient, when it has come and been added up."""
        last, self.last = self.last, None
        if last is not None:
            last.result()
        return self.host

    def here(self, asked: HostGradient) -> Tensor:
        self._check(asked)
        return self.wait()

    def _check(self, asked: HostGradient) -> None:
        if self._stands is None or asked is not self._stands():
            raise RuntimeError(f"this gradient of {self.name} is gone: a later backward pass has taken its place")

    def add(self, asked: HostGradient, more: Tensor) -> None:
        self._check(asked)
        gradient_offload = self._gradient_offload()
        if gradient_offload is not None and transfer_of(more.device) is not None:
            gradient_offload.add(self, more)
        else:  # the optimizer is gone
            self.wait().add_(more.cpu())


@final
class GradientOffload:
    """``buffers`` returns the pinned buffers of the placement's store, uint8 [n] each, after allocating what is
    missing; ``bound``
    is how many bytes of gradients may be on their way at once: the device holds no more of them."""

    def __init__(self, buffers: Callable[[], Sequence[Tensor]], bound: int) -> None:
        self.offloaded: dict[str, OffloadedGradient] = {}
        self._buffers = buffers
        self._bound = bound
        self._hooks = Hooks(self)
        self._on_way: deque[tuple[Event, int]] = deque()
        self._ends: list[Event] = []  # of the uses of buffers; the last of buffer i at the last i modulo their number
        self._apart: dict[torch.device, Streams] = {}
        self._queues: dict[torch.device, deque[tuple[Event, Any, Tensor]]] = {}  # for the steps beside backward()
        self._lock = threading.RLock()  # autograd runs the hooks of several devices in several threads

    # Which parameters --------------------------------------------------------------------------------------------

    def hook(self, parameters: Mapping[str, Tensor]) -> None:
        """Take the gradients of these parameters from now on, and of no others."""
        self._hooks.on(parameters)

    def take_new(self, name: str, p: Tensor) -> None:
        """Send the gradient of ``p`` down unless it is there, or in host memory as ``p`` is."""
        g = local_gradient(p)
        if transfer_of(p.device) is not None and g is not None and not isinstance(g, HostGradient):
            self.take(name, p)

    def allocate(self, name: str, dtype: torch.dtype, shape: torch.Size, transfer: DeviceTransfer) -> OffloadedGradient:
        """Room for this gradient, what is there being kept where it fits."""
        old = self.offloaded.get(name)
        if old is None or old.host.dtype != dtype or old.host.shape != shape:
            nbytes = shape.numel() * dtype.itemsize
            self.offloaded[name] = OffloadedGradient(self, name, transfer.host(nbytes), dtype, shape)
        return self.offloaded[name]

    # On their way ------------------------------------------------------------------------------------------------

    def take(self, name: str, p: Tensor) -> OffloadedGradient:
        """Send the gradient of ``p`` down, and put what stands for it in its place."""
        _refuse_replica(name, p)
        g, transfer = _checked(name, p), transfer_of(p.device)
        assert transfer is not None
        with self._lock:
            self._buffers()
            gradient = self.allocate(name, g.dtype, g.shape, transfer)
            self._make_way(g.nbytes)
            before = [gradient.last] if gradient.last is not None else []

            def down() -> None:
                gradient.host.copy_(g, non_blocking=True)
                leave(g)

            gradient.last = transfer.gradient_offload().submit("down", down, before, g.nbytes)
            self._on_way.append((gradient.last, g.nbytes))
            gradient.stand_in(p, g)
        return gradient

    def add(self, gradient: OffloadedGradient, more: Tensor) -> None:
        """Add the gradient of a further backward pass to one that is here or on its way."""
        transfer = transfer_of(more.device)
        assert transfer is not None
        with self._lock:
            buffers = self._buffers()
            self._make_way(more.nbytes)
            streams, apart = transfer.gradient_offload(), self.apart(more.device)
            new, old = more.reshape(-1), gradient.host.view(-1)
            size = buffers[0].numel() // new.itemsize if len(new) else 1
            for start in range(0, len(new), size):
                count = min(size, len(new) - start)
                self._piece(gradient, new[start : start + count], old[start : start + count], buffers, streams, apart)
            if gradient.last is not None:
                self._on_way.append((gradient.last, more.nbytes))

    def _piece(
        self,
        gradient: OffloadedGradient,
        new: Tensor,
        old: Tensor,
        buffers: Sequence[Tensor],
        streams: Streams,
        apart: Streams,
    ) -> None:
        room = buffers[len(self._ends) % len(buffers)][: new.nbytes].view(new.dtype)

        def down() -> None:
            room.copy_(new, non_blocking=True)
            leave(new)

        free = self._ends[-len(buffers) :][:1] if len(self._ends) >= len(buffers) else []
        came = streams.submit("down", down, free, new.nbytes)
        waits = [came] if gradient.last is None else [came, gradient.last]
        gradient.last = apart.submit("apart", lambda: _sum(old, room), waits, new.nbytes)
        self._ends.append(gradient.last)

    def submit_step(self, name: str, p: Tensor, entry: Any, step: Callable[[list[tuple[Any, Tensor]]], None]) -> None:
        """Send the gradient down, and have ``step`` called beside backward() with it and all that have come by then:
        the more there are, the better do their copies and steps overlap."""
        before = self.offloaded.get(name)
        if before is not None and before.reader is not None:
            self.synchronize()  # a backward pass that was given up
        gradient = self.take(name, p)
        came, gradient.last = gradient.last, None
        queue = self._queues.setdefault(p.device, deque())
        queue.append((came, entry, gradient.host))
        gradient.reader = self.apart(p.device).submit(
            "apart", lambda: _step_arrived(queue, step), [came], gradient.host.nbytes
        )

    def _make_way(self, nbytes: int) -> None:
        """Wait until what is under way leaves room for so many bytes more."""
        while self._on_way and sum(n for _, n in self._on_way) + nbytes > self._bound:
            self._on_way.popleft()[0].result()

    def apart(self, device: torch.device) -> Streams:
        """The thread beside backward() for this device."""
        if device not in self._apart:
            transfer = transfer_of(device)
            assert transfer is not None
            self._apart[device] = transfer.apart()
        return self._apart[device]

    def free_buffers(self) -> None:
        """Wait until no gradient uses a buffer."""
        ends, self._ends = self._ends, []
        for end in ends:
            end.result()

    def synchronize(self) -> None:
        """Wait for all that was begun beside backward(); raise the first error there was."""
        self._on_way.clear()
        try:
            for streams in self._apart.values():
                streams.synchronize()
        finally:
            self._queues.clear()
            for gradient in self.offloaded.values():
                gradient.reader = None

    def close(self) -> None:
        """Take the hooks away, and give gradients back to the device."""
        self.hook({})
        for gradient in self.offloaded.values():
            gradient.give_back()
        self.offloaded.clear()


def _step_arrived(queue: deque[tuple[Event, Any, Tensor]], step: Callable[[list[tuple[Any, Tensor]]], None]) -> None:
    ready = []
    while queue and queue[0][0].done():
        _, entry, gradient = queue.popleft()
        ready.append((entry, gradient))
    if ready:  # else a call before this one took it
        step(ready)


@torch.no_grad()
def _sum(old: Tensor, new: Tensor) -> None:
    old.add_(new)


def _checked(name: str, p: Tensor) -> Tensor:
    """What is here of the gradient of ``p``, cut as ``p`` is."""
    g: Any = check_gradient(name, p)
    if is_dtensor(g) and g.placements != p.placements:  # type: ignore[attr-defined]
        p.grad = g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    found = local_gradient(p)
    assert found is not None
    return found


def _refuse_replica(name: str, p: Tensor) -> None:
    if not averaged(p):
        raise RuntimeError(
            f"{name} is whole on each of {ranks()} ranks, and its gradient is this rank's alone when it is ready: "
            "DistributedDataParallel averages it later, in buckets whose room on the device would not become free. "
            "offload_gradients is for one process, and for what fully_shard reduces, whose gradients leave when all "
            "ranks have added theirs: write '/zero2' or '/zero3', which cut the state as '/zero1' does (for replicas "
            f"give memopt.shard a mesh of ({ranks()}, 1), which cuts nothing), or leave it out and give "
            "DistributedDataParallel gradient_as_bucket_view=True, with which the card has these buckets and no "
            "gradients beside them"
        )
