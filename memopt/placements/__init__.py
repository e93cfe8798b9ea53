"""Where state lives, one file each. ``PLACEMENTS`` is the axis: name -> :class:`~memopt.placements.base.Placement`."""

from memopt.placements.base import Placement
from memopt.placements.device import Device
from memopt.placements.paged import Paged

PLACEMENTS: dict[str, Placement] = {p.name: p for p in (Device(), Paged())}

__all__ = ["PLACEMENTS", "Placement"]
