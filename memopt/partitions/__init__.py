"""Which rank owns what, one file each. ``PARTITIONS`` is the axis: name -> class."""

from memopt.axis import Axis
from memopt.partitions.base import Partition

PARTITIONS: Axis[type[Partition]] = Axis(
    "memopt.partitions",
    {"none": "replicated.Replicated", "zero1": "zero1.Zero1", "zero2": "zero2.Zero2", "zero3": "zero3.Zero3"},
)

__all__ = ["PARTITIONS", "Partition"]
