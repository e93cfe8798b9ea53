"""Where state lives, one file each. ``PLACEMENTS`` is the axis: name -> :class:`~memopt.placements.base.Placement`."""

from memopt.core import registry
from memopt.core.registry import Axis
from memopt.placements.base import Placement, PlacementStore

PLACEMENTS: Axis[Placement] = registry.PLACEMENTS

__all__ = ["PLACEMENTS", "Placement", "PlacementStore"]
