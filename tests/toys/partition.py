"""State whole on every rank, under another name."""

from typing import final

from memopt.core.rows import Rows as Some
from memopt.partitions.base import Partition


@final
class Rows(Partition):
    """Every rank has everything."""

    name = "toyrows"
    summary = "a partition of a test"

    def __init__(self, process_group=None):
        self.group, self.rank, self.world_size = process_group, 0, 1

    @staticmethod
    def rows(shape, rank, world_size):
        return Some.whole(shape)
