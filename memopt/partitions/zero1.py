"""ZeRO-1: parameters and gradients on every rank, state cut by rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final
from weakref import ref

from memopt.core.rows import Rows, Shape, row_count
from memopt.partitions.base import MATRICES_TOGETHER, Partition, owned
from memopt.partitions.world import ProcessGroups, answered

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
        self._shards: dict[int, _Shards] = {}  # by identity of the parameter

    @staticmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        count = row_count(shape)
        return Rows(shape, count * rank // world_size, count * (rank + 1) // world_size)

    def groups(self, p: Tensor) -> ProcessGroups:
        return (self.group,) if self.world_size > 1 else ()

    def buckets(self, parameters: Sequence[Tensor], whole: Sequence[bool] = ()) -> list[tuple[int, int]]:
        """Of large matrices that ranks share out, as many as give each of them some."""
        if self.world_size == 1:
            return super().buckets(parameters)
        kinds = [(p.dtype, p.device) for p in parameters]
        nbytes = [p.numel() * p.element_size() for p in parameters]
        each = MATRICES_TOGETHER * self.world_size
        return buckets(nbytes, kinds, [each * n if its else 0 for n, its in zip(nbytes, whole, strict=False)])

    def all_gather_begin(self, parameters: Sequence[Tensor]) -> None:
        if self.world_size > 1:
            for first, stop in self.buckets(parameters):
                if len(self._travelling) == IN_FLIGHT:
                    self._travelling.pop(0).arrive()
                self._travelling.append(_Bucket(self, [self._shards_of(p) for p in parameters[first:stop]]))

    def _shards_of(self, p: Tensor) -> _Shards:
        found = self._shards.get(id(p))
        if found is None or not found.fit(p):
            self._shards = {key: one for key, one in self._shards.items() if one.owner() is not None}
            found = self._shards[id(p)] = _Shards(self, p)
        return found

    def all_gather_wait(self) -> None:
        while self._travelling:
            self._travelling.pop(0).arrive()

    def abandon(self) -> None:
        self._travelling.clear()


def buckets(nbytes: Sequence[int], kinds: Sequence[Any], least: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Ranges of parameters of one kind (dtype, device) and of at most ``BUCKET_NBYTES``, of one parameter, or of what
    is ``least`` for one of them.

    >>> buckets([20 << 20, 10 << 20, 50 << 20, 1], "aaab")
    [(0, 2), (2, 3), (3, 4)]
    >>> buckets([50 << 20, 50 << 20, 50 << 20], "aaa", [100 << 20, 100 << 20, 0])
    [(0, 2), (2, 3)]
    """
    found: list[tuple[int, int]] = []
    first = total = 0
    most = BUCKET_NBYTES
    for i, size in enumerate(nbytes):
        room = max(most, least[i]) if least else most
        if i > first and (kinds[i] != kinds[first] or total + size > room):
            found.append((first, i))
            first, total, most = i, 0, BUCKET_NBYTES
        total += size
        most = max(most, least[i]) if least else most
    return [*found, (first, len(nbytes))] if nbytes else []


class _Shards:
    """The rows of one parameter, by rank. They hold its memory, and are cut again where it has other memory."""

    def __init__(self, partition: Zero1, p: Tensor) -> None:
        whole = p.detach()
        rows = [partition.rows(tuple(p.shape), r, partition.world_size) for r in range(partition.world_size)]
        self.owner = ref(p)
        self._is = p.data_ptr(), p.shape, p.stride()
        self.rows = [owned(whole, one) for one in rows]
        self.numels = [one.numel() for one in self.rows]

    def fit(self, p: Tensor) -> bool:
        return self.owner() is p and self._is == (p.data_ptr(), p.shape, p.stride())


class _Bucket:
    """One all-gather under way: each rank sends its rows of these parameters, padded to the longest rank's."""

    def __init__(self, partition: Zero1, shards: Sequence[_Shards]) -> None:
        import torch
        import torch.distributed as dist

        self._rank, self._shards = partition.rank, shards
        self._numels = list(zip(*(one.numels for one in shards), strict=True))  # by rank
        longest = max(map(sum, self._numels))
        mine = [one.rows[self._rank].reshape(-1) for one in shards]
        send = mine[0].new_zeros(longest)
        if longest:
            torch.cat(mine, out=send[: sum(self._numels[self._rank])])
        self._received = send.new_empty(partition.world_size, longest)
        # Renamed in torch 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._sent = send  # alive until it has been sent
        with answered("a step"):
            self._work = gather(self._received.view(-1), send, group=partition.group, async_op=True)

    def arrive(self) -> None:
        """Wait, and put every rank's rows where they belong."""
        import torch

        with answered("a step"):
            self._work.wait()
        there, here = [], []
        for r, numels in enumerate(self._numels):
            if r != self._rank:
                parts = self._received[r, : sum(numels)].split(numels)
                there += [one.rows[r] for one in self._shards]
                here += [x.view(one.rows[r].shape) for one, x in zip(self._shards, parts, strict=True)]
        torch._foreach_copy_(there, here)
