"""Which rank owns what, one file each. ``PARTITIONS`` is the axis: name -> class."""

from memopt import registry
from memopt.partitions.base import Partition
from memopt.registry import Axis

PARTITIONS: Axis[type[Partition]] = registry.PARTITIONS

__all__ = ["PARTITIONS", "Partition"]
