"""How a moment is stored, one file each. ``FORMATS`` is the axis: name -> :class:`~memopt.formats.base.Format`."""

from memopt.formats.base import Format, Shard
from memopt.formats.bf16 import BF16
from memopt.formats.factored import Factored
from memopt.formats.fp8 import FP8
from memopt.formats.fp32 import FP32
from memopt.formats.int4 import Int4
from memopt.formats.int8 import Int8
from memopt.formats.rowmean import RowMean

FORMATS: dict[str, Format] = {f.name: f for f in (FP32(), BF16(), Int8(), FP8(), Int4(), Factored())}

#: Every format that may hold a moment: the axis, and those that only a rule can ask for (``Moment.held``).
HELD: dict[str, Format] = {**FORMATS, RowMean.name: RowMean()}

__all__ = ["FORMATS", "HELD", "Format", "Shard"]
