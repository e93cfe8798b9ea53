"""``host``: pinned host memory, streamed through the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from memopt.core.ledger import Line
from memopt.layout.chunks import ChunkedState, StoreOptions, buffers, extents, target_of
from memopt.placements.base import Placement, PlacementStore
from memopt.placements.workspaces import HOST_MOST, HOST_TARGET, buffer_lines


@final
class Host(Placement):
    """State in host memory; the step runs on the parameter's device, through which the state is streamed: copy in, step
    and copy out of different chunks happen at once. ``workspace`` bounds the device memory this takes. Rules that need
    statistics of a whole tensor chunk whole parameters: then the bound is the largest one's state, if that is more.

    Parameters in host memory are stepped where their state is: nothing is copied, as with ``device``.
    """

    name = "host"
    keeps_on_host = True
    summary = "in pinned host memory, streamed through the device"

    def location(self, device: str) -> str:
        return "cpu" if device == "cpu" else "pinned"

    def placement_store(self, store_options: StoreOptions) -> PlacementStore:
        from memopt.placements.stores.host import Pinned

        return Pinned(self, store_options)

    def workspace(self, chunked: Sequence[ChunkedState], device: str, options: Mapping[str, Any]) -> list[Line]:
        if device == "cpu":
            return []
        target = target_of(options["workspace"], HOST_TARGET, HOST_MOST)
        wanted = buffers(extents(chunked, target), target, options["workspace"], HOST_MOST)
        return buffer_lines(wanted, None, device)
