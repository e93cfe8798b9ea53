"""``device``: beside the parameter."""

from __future__ import annotations

from typing import final

from memopt.layout.chunks import StoreOptions
from memopt.placements.base import Placement, PlacementStore


@final
class Device(Placement):
    """Ordinary memory of the parameter's own device."""

    name = "device"
    summary = "beside the parameter"

    def location(self, device: str) -> str:
        return device

    def placement_store(self, store_options: StoreOptions) -> PlacementStore:
        return PlacementStore(self)
