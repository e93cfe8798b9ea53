"""Where state lives, one file each. ``PLACEMENTS`` is the axis: name -> :class:`~memopt.placements.base.Placement`."""

from memopt.axis import Axis
from memopt.placements.base import Home, Placement

PLACEMENTS: Axis[Placement] = Axis(
    "memopt.placements",
    {"device": "device.Device", "paged": "paged.Paged", "host": "host.Host", "cpu": "cpu.Cpu", "disk": "disk.Disk"},
    lambda kind: kind(),
)

__all__ = ["PLACEMENTS", "Home", "Placement"]
