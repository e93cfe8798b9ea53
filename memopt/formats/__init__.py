"""How a moment is stored, one file each. ``FORMATS`` is the axis: name -> :class:`~memopt.formats.base.Format`."""

from memopt.core import registry
from memopt.core.registry import Axis
from memopt.formats.base import Format, Shard

FORMATS: Axis[Format] = registry.FORMATS
#: Every format that may hold a moment: the axis, and those that only a rule can ask for (``Moment.fixed_format``).
ALL_FORMATS: Axis[Format] = registry.ALL_FORMATS

__all__ = ["ALL_FORMATS", "FORMATS", "Format", "Shard"]
