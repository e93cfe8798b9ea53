"""Who executes, one file each. ``ENGINES`` is the axis: name -> :class:`~memopt.engines.base.Engine`."""

from memopt import registry
from memopt.engines.base import Engine
from memopt.registry import Axis

ENGINES: Axis[Engine] = registry.ENGINES

__all__ = ["ENGINES", "Engine"]
