"""Gradients whose copies come down in ``backward()``, each as it becomes ready, for the store of ``@cpu``.

The gradient stays on the device, in ``p.grad``, where anything may be done to it. Its copy goes to the very place in
the step's pinned buffers from which the step would read it, which lies idle during ``backward()``: no memory is taken
for it, and as many copies are made as the buffers hold, first come, first served. The step begins with what is there
and fetches the rest meanwhile.

A copy is used only if ``p.grad`` is still the same tensor in the same memory, torch has not counted a write to it but
those of ``memopt.clip_grad_norm_``, and its bits have the number (:mod:`memopt.placements.gradients.checksum`) that
they had when the copy was begun: torch does not count what is written through ``.data``. (What is written there while
the copy is made, and undone before the step, would not be seen; nothing does that but DistributedDataParallel, under
which there are no copies.) Anything else comes down in the step. A gradient whose copy was in vain in ``PATIENCE``
steps running is not copied any more.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from memopt.layout.chunks import Piece
from memopt.placements.gradients.checksum import fingerprint
from memopt.placements.gradients.hooks import Hooks, averaged, leave, ranks
from memopt.placements.gradients.host_grad import local_gradient
from memopt.placements.stores.streaming import ChunkSlice, Placed
from memopt.placements.transfer.device import transfer_of

if TYPE_CHECKING:
    from memopt.placements.transfer.pipeline import Event

#: Steps in which a gradient's copy may be in vain.
PATIENCE = 2
#: Bytes of a gradient below which to look at its bits twice takes longer than to copy them.
WORTH = 2**16
#: All copies there are, of every optimizer.
_COPIES: weakref.WeakSet[Copy] = weakref.WeakSet()
NO_MEMORY = "the device has no memory left for looking at them"


@final
class BufferSlice:
    """A piece and where it stands in which buffer."""

    def __init__(self, number: int, piece: Piece, buffer: int, at: int) -> None:
        self.number, self.piece, self.buffer, self.at = number, piece, buffer, at

    def gradient_in(self, buffer: Tensor, like: Tensor) -> Tensor:
        """Where the step would put its gradient: behind the parameter."""
        begin = self.at + self.piece.parts[1].at
        return buffer[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


@final
class Copy:
    """One gradient's."""

    def __init__(self, p: Tensor, g: Tensor, places: list[BufferSlice]) -> None:
        self.p, self.places = p, places
        self.numel = sum(t.numel() for _, t in self.parts(g))
        self._g, self._at, self._version = weakref.ref(g), g.data_ptr(), g._version
        self.mark: Tensor | None = None  # int64 [], on the device
        self.ended: Event | None = None
        _COPIES.add(self)

    def parts(self, g: Tensor) -> list[tuple[BufferSlice, Tensor]]:
        """The rows of ``g`` that are copied, by place."""
        begin = self.places[0].piece.rows.bounds[0]
        found = []
        for place in self.places:
            rows = place.piece.rows
            start, stop = (bound - begin for bound in rows.bounds)
            found.append((place, g if rows.is_whole else g[start:stop]))
        return found

    def of(self, g: Tensor) -> bool:
        """Whether ``g`` is the tensor that was copied."""
        return self._g() is g

    def marked(self, g: Tensor) -> Tensor:
        """The number of what is copied."""
        return fingerprint(g.view(-1)[: self.numel])

    def excuse(self, g: Tensor) -> None:
        """``g`` has just been written to, once and harmlessly."""
        if self.of(g) and g._version == self._version + 1:
            self._version = g._version

    def candidate(self) -> Tensor | None:
        """The gradient, if nothing is known that has happened to it."""
        g = local_gradient(self.p)
        if g is None or not self.of(g) or g.data_ptr() != self._at or g._version != self._version:
            return None
        return g


def scaled(gradients: Iterable[Tensor]) -> None:
    """Each of these has just been multiplied by one number. Its bits tell whether a copy still is the gradient: where
    none has changed, none was another meanwhile. So clipping that had nothing to clip leaves the copies what they are.
    """
    if _COPIES:
        by_id = {id(g) for g in gradients}
        for copy in list(_COPIES):
            g = local_gradient(copy.p)
            if g is not None and id(copy.p.grad) in by_id:
                copy.excuse(g)


@final
class GradientPrefetch:
    """``chunks`` is the placement's store's: name -> (something, pieces, something) of the parameters that have
    stepped."""

    def __init__(self, chunks: Mapping[str, tuple[Any, Sequence[Piece], Any]]) -> None:
        self._chunks = chunks
        self._buffers: Sequence[Tensor] = ()  # the placement's store's, uint8 [n] each
        self._hooks = Hooks(self)
        self._copies: dict[str, Copy] = {}
        self._ends: list[int] = []  # bytes taken of each buffer
        self._passes: dict[str, tuple[Any, int]] = {}  # a gradient, and how often it has come since the last step
        self._awaited: dict[str, int] = {}  # how often one came in the step before
        self._in_vain: dict[str, int] = {}
        self._lock = threading.RLock()  # autograd runs the hooks of several devices in several threads
        self.device: torch.device | None = None  # whose gradients are copied
        self.used = self.made = 0  # copies, in the last step
        #: Why none is made any more.
        self.stopped: str | None = None

    # In backward() -----------------------------------------------------------------------------------------------

    def hook(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy the gradients of these, as far as there is room, and of no others."""
        self._hooks.on({} if self.stopped else {n: p for n, p in parameters.items() if self._hopeful(n)})

    def take_new(self, name: str, p: Tensor) -> None:
        g = local_gradient(p)
        if g is None or type(g) is not Tensor or g.layout is not torch.strided or not g.is_contiguous():
            return
        if self.stopped or p.device != self.device or not WORTH <= g.nbytes <= 4 * g.numel():
            return
        if not averaged(p):
            self.stopped = f"{ranks()} processes average gradients after they are ready"
            return
        with self._lock:
            last, count = self._passes.get(name, (None, 0))
            count = count + 1 if last is not None and last() is g else 1
            self._passes[name] = weakref.ref(g), count
            if count >= self._awaited.get(name, 1) and self._hopeful(name):
                self._begin(name, p, g)

    def _begin(self, name: str, p: Tensor, g: Tensor) -> None:
        before = self._copies.get(name)
        places = before.places if before is not None else self._places(name)
        if not places or places[0].piece.rows.shape != g.shape:
            return
        copy, buffers = Copy(p, g, places), self._buffers
        transfer = transfer_of(g.device)
        assert transfer is not None

        def down() -> None:
            copy.mark = copy.marked(g)
            for place, rows in copy.parts(g):
                place.gradient_in(buffers[place.buffer], rows).copy_(rows, non_blocking=True)
            leave(g)

        try:
            copy.ended = transfer.gradient_offload().submit("down", down, [], copy.numel * g.itemsize)
        except torch.OutOfMemoryError:  # of the device, which trained well without
            self.stopped = NO_MEMORY
            return
        self._copies[name] = copy

    def _places(self, name: str) -> list[BufferSlice]:
        """Where its pieces go, as many of the first of them as there is room for."""
        room = self._buffers[0].numel() if self._buffers else 0
        found: list[BufferSlice] = []
        for number, piece in enumerate(self._chunks[name][1]):
            if not self._ends or self._ends[-1] + piece.nbytes > room:
                if len(self._ends) == len(self._buffers) or piece.nbytes > room:
                    break
                self._ends.append(0)
            found.append(BufferSlice(number, piece, len(self._ends) - 1, self._ends[-1]))
            self._ends[-1] += piece.nbytes
        return found

    # In the step -------------------------------------------------------------------------------------------------

    def claim(self, slices: Sequence[ChunkSlice]) -> list[list[Placed]]:
        """Of these, those whose gradient is in its place, with where that is, by buffer. What else was copied is
        forgotten: the buffers are the step's now."""
        there = self._verified()
        placed = {(name, place.number): place for name, copy in there.items() for place in copy.places}
        chunks: list[list[Placed]] = [[] for _ in self._ends]
        for chunk_slice in slices:
            place = placed.get((chunk_slice.work.name, chunk_slice.number))
            if (
                place is not None
                and place.piece == chunk_slice.piece
                and chunk_slice.work.g is local_gradient(there[chunk_slice.work.name].p)
            ):
                chunks[place.buffer].append((chunk_slice, place.at))
        self._learn(there, {chunk_slice.work.name for chunk_slice in slices})
        self.forget()
        return chunks

    def _verified(self) -> dict[str, Copy]:
        self._wait()
        found: list[tuple[str, Copy, Tensor]] = []
        for name, copy in self._copies.items():
            g = copy.candidate()
            if g is not None:
                found.append((name, copy, g))
        if not found:
            return {}
        before = torch.stack([copy.mark for _, copy, _ in found if copy.mark is not None])
        try:
            now = torch.stack([copy.marked(g) for _, copy, g in found])
        except torch.OutOfMemoryError:
            self.stopped = NO_MEMORY
            return {}
        return {name: copy for (name, copy, _), same in zip(found, (before == now).tolist(), strict=True) if same}

    def _learn(self, there: Mapping[str, Copy], stepped: set[str]) -> None:
        """What became of the copies, and after how many backward passes the next ones are to be made."""
        self.used, self.made = len(there), len(self._copies)
        for name in self._copies:
            self._in_vain[name] = 0 if name in there else self._in_vain.get(name, 0) + 1
        for name in stepped & self._passes.keys():
            self._awaited[name] = self._passes.pop(name)[1]

    def _hopeful(self, name: str) -> bool:
        return self._in_vain.get(name, 0) < PATIENCE

    def ready(self, device: torch.device, buffers: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
        """A step has been made, and these are idle until the next."""
        self.device, self._buffers = device, buffers
        self.hook(parameters)

    def forget(self) -> None:
        """Buffers are about to be used, or to go away."""
        self._wait()
        self._copies, self._ends, self._buffers = {}, [], ()

    def _wait(self) -> None:
        for copy in self._copies.values():
            if copy.ended is not None:
                copy.ended.result()

    def explain(self) -> str:
        """Half a sentence: when gradients come down."""
        if self.stopped:
            return f"gradients come down in the step, not in backward(): {self.stopped}"
        if self.device is None:
            return "gradients come down in backward() from the first step on, as many as the buffers hold"
        given_up = sum(not self._hopeful(name) for name in self._in_vain)
        changed = (
            (
                f"; {given_up} are not copied there any more, something changed them after it in {PATIENCE} steps "
                "running (clipping, a scaler)"
            )
            if given_up
            else ""
        )
        return (
            f"gradients come down in backward(), as many as the buffers hold, and others in the step: in the last "
            f"one {self.made} had been copied, and {self.used} were still the gradient{changed}"
        )

    def close(self) -> None:
        self._hooks.on({})
        self.forget()
