"""ZeRO-1: parameters and gradients on every rank, state cut by rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, final

from memopt.geometry import Rows, Shape, row_count
from memopt.partitions.base import Groups, Partition, owned, sum_over
from memopt.partitions.world import membership

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes of one all-gather, all ranks together.
BUCKET_NBYTES = 32 * 2**20


@final
class Zero1(Partition):
    """Rank r of N owns rows ``[R r // N, R (r + 1) // N)`` of a parameter of R rows: at most ``ceil(R / N)``.

    Every rank must hold the same gradients (DistributedDataParallel's, or all-reduced by hand). A rank updates its
    rows, then rows are all-gathered in buckets of 32 MiB. Without ``torch.distributed`` it is a world of one: the
    same path with nothing to send.

    Source: Rajbhandari et al., "ZeRO", SC 2020 (P_os); rows instead of whole parameters, so that ranks are balanced
    to one row per parameter.
    """

    name = "zero1"
    summary = "state cut by rows over the data-parallel ranks"

    def __init__(self, process_group: Any = None) -> None:
        self.group = process_group
        self._rank, self._world_size = membership(self.name, process_group)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @staticmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        count = row_count(shape)
        return Rows(shape, count * rank // world_size, count * (rank + 1) // world_size)

    def groups(self, p: Tensor) -> Groups:
        return (self.group,) if self.world_size > 1 else ()

    def total(self, x: Tensor) -> Tensor:
        return sum_over(x, (self.group,)) if self.world_size > 1 else x

    def publish(self, parameters: Iterable[Tensor]) -> None:
        if self.world_size == 1:
            return
        bucket: list[Tensor] = []
        nbytes = 0
        for p in parameters:
            if bucket and (
                p.dtype != bucket[0].dtype
                or p.device != bucket[0].device
                or nbytes + p.numel() * p.element_size() > BUCKET_NBYTES
            ):
                self._gather(bucket)
                bucket, nbytes = [], 0
            bucket.append(p)
            nbytes += p.numel() * p.element_size()
        if bucket:
            self._gather(bucket)

    def _gather(self, parameters: list[Tensor]) -> None:
        """One all-gather: each rank sends its rows of these parameters, padded to the longest rank's."""
        import torch
        import torch.distributed as dist

        shards = [
            [owned(p, self.rows(tuple(p.shape), r, self.world_size)) for p in parameters]
            for r in range(self.world_size)
        ]
        longest = max(sum(s.numel() for s in rank) for rank in shards)
        send = parameters[0].new_zeros(longest)
        mine = shards[self.rank]
        if longest:
            flat = torch.cat([s.reshape(-1) for s in mine])
            send[: flat.numel()] = flat
        received = parameters[0].new_empty(longest * self.world_size)
        dist.all_gather_into_tensor(received, send, group=self.group)
        for r, rank in enumerate(shards):
            if r == self.rank:
                continue
            offset = r * longest
            for s in rank:
                s.copy_(received[offset : offset + s.numel()].view(s.shape))
                offset += s.numel()
