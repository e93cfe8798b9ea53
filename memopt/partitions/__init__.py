"""Which rank owns what, one file each. ``PARTITIONS`` is the axis: name -> class."""

from memopt.core import registry
from memopt.core.registry import Axis
from memopt.partitions.base import Partition

PARTITIONS: Axis[type[Partition]] = registry.PARTITIONS

__all__ = ["PARTITIONS", "Partition"]
