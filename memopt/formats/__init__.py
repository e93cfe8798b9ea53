"""How a moment is stored, one file each. ``FORMATS`` is the axis: name -> :class:`~memopt.formats.base.Format`."""

from memopt import registry
from memopt.formats.base import Format, Shard
from memopt.registry import Axis

FORMATS: Axis[Format] = registry.FORMATS
#: Every format that may hold a moment: the axis, and those that only a rule can ask for (``Moment.held``).
HELD: Axis[Format] = registry.HELD

__all__ = ["FORMATS", "HELD", "Format", "Shard"]
