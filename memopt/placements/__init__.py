"""Where state lives, one file each. ``PLACEMENTS`` is the axis: name -> :class:`~memopt.placements.base.Placement`."""

from memopt import registry
from memopt.placements.base import Home, Placement
from memopt.registry import Axis

PLACEMENTS: Axis[Placement] = registry.PLACEMENTS

__all__ = ["PLACEMENTS", "Home", "Placement"]
