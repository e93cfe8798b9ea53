"""Ordinary memory under another name."""

from typing import final

from memopt.placements.base import Placement, PlacementStore


@final
class Elsewhere(Placement):
    """Beside the parameter; the ledger says ``toy:DEVICE``."""

    name = "toyplace"
    summary = "a placement of a test"

    def location(self, device):
        return f"toy:{device}"

    def placement_store(self, store_options):
        return PlacementStore(self)
