"""Who executes, one file each. ``ENGINES`` is the axis: name -> :class:`~memopt.engines.base.Engine`."""

from memopt.core import registry
from memopt.core.registry import Axis
from memopt.engines.base import Engine

ENGINES: Axis[Engine] = registry.ENGINES

__all__ = ["ENGINES", "Engine"]
