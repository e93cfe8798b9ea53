"""What a training step really keeps and really allocates, on the CPU: what the formulas are held to."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Saved(NamedTuple):
    """Tensors that autograd keeps for the backward pass, one entry per storage: ``(shape, dtype, nbytes)``."""

    entries: tuple[tuple[tuple[int, ...], str, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for *_, nbytes in self.entries)


def saved(
    module: torch.nn.Module, run: Callable[[], Any], others: Callable[[], list[torch.Tensor]] | None = None
) -> Saved:
    """The storages that ``run()`` saves for its backward pass, each once; those of parameters and buffers are not
    activations. ``run`` is a forward pass that returns what keeps its graph alive, ``others`` gives tensors that no
    hook sees, as selective checkpointing keeps them."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept.setdefault(pointer, tensor.detach())  # alive until the end, or its address could be used again
        return tensor.detach()  # the tensor itself may be a result, which would keep its own graph and so itself

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
        for tensor in others() if others else ():
            pack(tensor)
    entries = tuple(
        (tuple(t.shape), str(t.dtype).removeprefix("torch."), t.untyped_storage().nbytes()) for t in kept.values()
    )
    del result
    return Saved(entries)


class Curve(NamedTuple):
    """Bytes that the CPU allocator had handed out and not got back, relative to the start of the run."""

    live: tuple[int, ...]
    #: Where each named phase begins in ``live``.
    marks: tuple[tuple[str, int], ...]
    #: Of ``live``, what a convolution or a matrix product has made and frees itself: reordered and packed operands,
    #: scratch memory.
    scratch: tuple[int, ...] = ()

    @property
    def peak(self) -> int:
        return max(self.live, default=0)

    @property
    def peak_of_tensors(self) -> int:
        """The peak without what convolutions and matrix products make and free inside of themselves."""
        return max((a - b for a, b in zip(self.live, self.scratch, strict=True)), default=0)

    def peak_of(self, phase: str) -> int:
        """The peak of one phase."""
        starts = [at for _, at in self.marks] + [len(self.live)]
        for (name, start), end in zip(self.marks, starts[1:], strict=True):
            if name == phase:
                return max(self.live[max(start - 1, 0) : end], default=0)
        raise KeyError(phase)


def traced(*phases: tuple[str, Callable[[], Any]]) -> Curve:
    """Run the phases under torch's profiler and follow every allocation of the CPU allocator: those of tensors and
    those that operations make and free inside."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for name, run in phases:
            with torch.profiler.record_function(f"phase:{name}"):
                run()
    events: list[tuple[int, int, str]] = []
    inside: list[tuple[int, int]] = []
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            events.append((event.start_ns(), event.nbytes(), ""))
        elif event.name().startswith("phase:"):
            events.append((event.start_ns(), 0, event.name().removeprefix("phase:")))
        elif event.name() in _LIBRARY:
            inside.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    events.sort(key=lambda e: e[0])
    own = _made_and_freed(events, inside)
    live: list[int] = []
    scratch: list[int] = []
    marks: list[tuple[str, int]] = []
    total = aside = 0
    for at, (_, nbytes, phase) in enumerate(events):
        if phase:
            marks.append((phase, len(live)))
        else:
            total += nbytes
            aside += nbytes if at in own else 0
            live.append(total)
            scratch.append(aside)
    return Curve(tuple(live), tuple(marks), tuple(scratch))


#: Operations that call a library's convolutions and products (oneDNN, a BLAS).
_LIBRARY = frozenset(
    f"aten::{name}"
    for name in ("mkldnn_convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv")
)


def _made_and_freed(events: list[tuple[int, int, str]], inside: list[tuple[int, int]]) -> set[int]:
    """Places in ``events`` (by time) of what is allocated and freed between the same start and end of ``inside``."""
    found: set[int] = set()
    times = [time for time, _, _ in events]
    for start, end in inside:
        made: dict[int, list[int]] = {}
        for at in range(bisect_left(times, start), bisect_right(times, end)):
            nbytes = events[at][1]
            if nbytes > 0:
                made.setdefault(nbytes, []).append(at)
            elif made.get(-nbytes):
                found |= {at, made[-nbytes].pop()}
    return found
