"""Who executes, one file each. ``ENGINES`` is the axis: name -> :class:`~memopt.engines.base.Engine`."""

from memopt.axis import Axis
from memopt.engines.base import Engine

ENGINES: Axis[Engine] = Axis(
    "memopt.engines",
    {"native": "native.Native", "bitsandbytes": "bitsandbytes.BitsAndBytes"},
    lambda kind: kind(),
)

__all__ = ["ENGINES", "Engine"]
