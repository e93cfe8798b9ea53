"""Which rank owns what, one file each. ``PARTITIONS`` is the axis: name -> class."""

from memopt.partitions.base import Partition
from memopt.partitions.replicated import Replicated
from memopt.partitions.zero1 import Zero1

PARTITIONS: dict[str, type[Partition]] = {p.name: p for p in (Replicated, Zero1)}

__all__ = ["PARTITIONS", "Partition"]
