"""``cpu``: state and step in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from memopt.core.ledger import Line, TensorSpec
from memopt.layout.chunks import ChunkedState, StoreOptions, buffers, extents, target_of
from memopt.placements.base import Placement, PlacementStore
from memopt.placements.workspaces import CPU_TARGET, buffer_lines, gradient_line, most_of, staging


@final
class Cpu(Placement):
    """State in host memory and the step on the host's processor: the card needs room for neither. Parameters and
    gradients on a card pass through pinned buffers, ``workspace`` at most (written for CUDA, not yet run on a GPU).
    Parameters in host memory are stepped where they are, as with ``device``.

    Gradients are copied to the host in the step. With ``offload_gradients="early"`` as many as the buffers hold are
    copied in ``backward()``, each when it is ready, and the copy is used if nothing has changed the gradient by then;
    whether that is faster has not been measured on a card, so it is not the default. With ``True`` gradients leave the
    card in ``backward()`` and have memory of their own on the host, pinned, as much as they take on the card.

    Source: Ren et al., "ZeRO-Offload", USENIX ATC 2021.
    """

    name = "cpu"
    keeps_on_host = True
    steps_on_host = True
    summary = "in host memory, and the step on the host's processor"

    def location(self, device: str) -> str:
        return "cpu"

    def placement_store(self, store_options: StoreOptions) -> PlacementStore:
        from memopt.placements.stores.cpu import Offloaded

        return Offloaded(self, store_options)

    def workspace(self, chunked: Sequence[ChunkedState], device: str, options: Mapping[str, Any]) -> list[Line]:
        if device == "cpu":
            return []
        most = most_of(options)
        target = target_of(options["workspace"], CPU_TARGET, most)
        offloads = options["offload_gradients"] is True
        staged = {id(h): staging(h, offloads) for h in chunked}
        wanted = buffers(extents([staged[id(h)] for h in chunked], target), target, options["workspace"], most)
        nbytes = sum(TensorSpec(h.dtype, h.rows.local_shape).nbytes for h in chunked)
        return [*buffer_lines(wanted, "pinned", "cpu"), *(gradient_line(nbytes) if offloads else [])]
