"""How a moment is stored, one file each. ``FORMATS`` is the axis: name -> :class:`~memopt.formats.base.Format`."""

from functools import cache

from memopt.axis import Axis
from memopt.formats.base import Format, Shard

_PLACES = {
    "32bit": "fp32.FP32",
    "bf16": "bf16.BF16",
    "8bit": "int8.Int8",
    "fp8": "fp8.FP8",
    "4bit": "int4.Int4",
    "factored": "factored.Factored",
}


@cache
def _made(kind: type[Format]) -> Format:
    """The same object on both axes below."""
    return kind()


FORMATS: Axis[Format] = Axis("memopt.formats", _PLACES, _made)

#: Every format that may hold a moment: the axis, and those that only a rule can ask for (``Moment.held``).
HELD: Axis[Format] = Axis("memopt.formats", {**_PLACES, "rowmean": "rowmean.RowMean"}, _made)

__all__ = ["FORMATS", "HELD", "Format", "Shard"]
