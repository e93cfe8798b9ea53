"""Who executes, one file each. ``ENGINES`` is the axis: name -> :class:`~memopt.engines.base.Engine`."""

from memopt.engines.base import Engine
from memopt.engines.bitsandbytes import BitsAndBytes
from memopt.engines.native import Native

ENGINES: dict[str, Engine] = {e.name: e for e in (Native(), BitsAndBytes())}

__all__ = ["ENGINES", "Engine"]
