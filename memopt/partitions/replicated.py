"""No partition: every rank owns everything."""

from __future__ import annotations

from typing import final

from memopt.core.rows import Rows, Shape
from memopt.partitions.base import Partition


@final
class Replicated(Partition):
    """State is whole on every rank; nothing is communicated."""

    name = "none"
    summary = "whole on every rank"

    def __init__(self, process_group: object = None) -> None:
        if process_group is not None:
            raise ValueError("process_group is for a sharded spec such as 'adamw/zero1'; this spec is not sharded")
        self.group, self.rank, self.world_size = None, 0, 1

    @staticmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        return Rows.whole(shape)
