"""ZeRO-1: parameters and gradients on every rank, state cut by rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from memopt.core.rows import Rows, Shape, row_count
from memopt.partitions.base import Partition, owned
from memopt.partitions.world import Groups, answered

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes of one all-gather, all ranks together.
BUCKET_NBYTES = 32 * 2**20
#: All-gathers under way at once: each has a bucket's memory.
IN_FLIGHT = 2


@final
class Zero1(Partition):
    """Rank r of N owns rows ``[R r // N, R (r + 1) // N)`` of a parameter of R rows: at most ``ceil(R / N)``.

    Every rank must hold the same gradients (DistributedDataParallel's, or all-reduced by hand). A rank updates its
    rows, and rows are all-gathered in buckets of 32 MiB, one travelling while the next is updated. Without
    ``torch.distributed`` it is a world of one: the same path with nothing to send.

    Source: Rajbhandari et al., "ZeRO", SC 2020 (P_os); rows instead of whole parameters, so that ranks are balanced
    to one row per parameter.
    """

    name = "zero1"
    summary = "state cut by rows over the data-parallel ranks"

    def __init__(self, process_group: Any = None) -> None:
        super().__init__(process_group)
        self._travelling: list[_Bucket] = []

    @staticmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        count = row_count(shape)
        return Rows(shape, count * rank // world_size, count * (rank + 1) // world_size)

    def groups(self, p: Tensor) -> Groups:
        return (self.group,) if self.world_size > 1 else ()

    def buckets(self, parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
        if self.world_size == 1:
            return super().buckets(parameters)
        kinds = [(p.dtype, p.device) for p in parameters]
        return buckets([p.numel() * p.element_size() for p in parameters], kinds)

    def publish(self, parameters: Sequence[Tensor]) -> None:
        if self.world_size > 1 and parameters:
            if len(self._travelling) == IN_FLIGHT:
                self._travelling.pop(0).arrive()
            self._travelling.append(_Bucket(self, parameters))

    def finish(self) -> None:
        while self._travelling:
            self._travelling.pop(0).arrive()

    def abandon(self) -> None:
        self._travelling.clear()


def buckets(nbytes: Sequence[int], kinds: Sequence[Any]) -> list[tuple[int, int]]:
    """Ranges of parameters of one kind (dtype, device) and of at most ``BUCKET_NBYTES``, or of one parameter.

    >>> buckets([20 << 20, 10 << 20, 50 << 20, 1], "aaab")
    [(0, 2), (2, 3), (3, 4)]
    """
    found: list[tuple[int, int]] = []
    first = total = 0
    for i, size in enumerate(nbytes):
        if i > first and (kinds[i] != kinds[first] or total + size > BUCKET_NBYTES):
            found.append((first, i))
            first, total = i, 0
        total += size
    return [*found, (first, len(nbytes))] if nbytes else []


class _Bucket:
    """One all-gather under way: each rank sends its rows of these parameters, padded to the longest rank's."""

    def __init__(self, partition: Zero1, parameters: Sequence[Tensor]) -> None:
        import torch
        import torch.distributed as dist

        world = range(partition.world_size)
        self._rank = partition.rank
        self._shards = [
            [owned(p, partition.rows(tuple(p.shape), r, partition.world_size)) for p in parameters] for r in world
        ]
        self._longest = max(sum(s.numel() for s in rank) for rank in self._shards)
        send = parameters[0].new_zeros(self._longest)
        if self._longest:
            flat = torch.cat([s.detach().reshape(-1) for s in self._shards[self._rank]])
            send[: flat.numel()] = flat
        self._received = parameters[0].new_empty(self._longest * partition.world_size)
        # Renamed in torch 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._sent = send  # alive until it has been sent
        with answered("a step"):
            self._work = gather(self._received, send, group=partition.group, async_op=True)

    def arrive(self) -> None:
        """Wait, and put every rank's rows where they belong."""
        with answered("a step"):
            self._work.wait()
        for r, rank in enumerate(self._shards):
            if r == self._rank:
                continue
            offset = r * self._longest
            for s in rank:
                s.copy_(self._received[offset : offset + s.numel()].view(s.shape))
                offset += s.numel()
