"""Where state lives, one file each. ``PLACEMENTS`` is the axis: name -> :class:`~memopt.placements.base.Placement`."""

from memopt.placements.base import Home, Placement
from memopt.placements.cpu import Cpu
from memopt.placements.device import Device
from memopt.placements.disk import Disk
from memopt.placements.host import Host
from memopt.placements.paged import Paged

PLACEMENTS: dict[str, Placement] = {p.name: p for p in (Device(), Paged(), Host(), Cpu(), Disk())}

__all__ = ["PLACEMENTS", "Home", "Placement"]
