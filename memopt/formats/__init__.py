"""How a moment is stored, one file each. ``FORMATS`` is the axis: name -> :class:`~memopt.formats.base.Format`."""

from memopt.formats.base import Format, Shard
from memopt.formats.bf16 import BF16
from memopt.formats.factored import Factored
from memopt.formats.fp8 import FP8
from memopt.formats.fp32 import FP32
from memopt.formats.int4 import Int4
from memopt.formats.int8 import Int8

FORMATS: dict[str, Format] = {f.name: f for f in (FP32(), BF16(), Int8(), FP8(), Int4(), Factored())}

__all__ = ["FORMATS", "Format", "Shard"]
