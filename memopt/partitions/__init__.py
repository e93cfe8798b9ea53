"""Which rank owns what, one file each. ``PARTITIONS`` is the axis: name -> class."""

from memopt.partitions.base import Partition
from memopt.partitions.replicated import Replicated
from memopt.partitions.zero1 import Zero1
from memopt.partitions.zero2 import Zero2
from memopt.partitions.zero3 import Zero3

PARTITIONS: dict[str, type[Partition]] = {p.name: p for p in (Replicated, Zero1, Zero2, Zero3)}

__all__ = ["PARTITIONS", "Partition"]
