"""Rows of many matrices to the ranks that work on them whole, and back: two all-to-alls for a bucket of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from memopt.partitions.world import answered

if TYPE_CHECKING:
    from torch import Tensor

#: Of the rows of one rank, along dimension 0: where those that it answers for begin and end, and those that it has.
#: They differ where a row is cut between ranks, and stepped on each of them.
RowRange = tuple[int, int]


class Share(NamedTuple):
    sends: RowRange
    has: RowRange


class ShardedMatrix(NamedTuple):
    """A matrix of which this rank has rows: ``x`` [rows here, columns], ``shares`` of all ranks of the group."""

    x: Tensor
    rows: int
    shares: tuple[Share, ...]

    @property
    def cols(self) -> int:
        return int(self.x.shape[1])


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that works on each matrix: the dearest first, to whoever has least. The same on all ranks.

    >>> owners([1, 5, 3, 3], 2)
    [0, 0, 1, 1]
    """
    load, found = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[i] = min(range(ranks), key=lambda r: (load[r], r))
        load[found[i]] += costs[i]
    return found


def on_owners(
    cuts: Sequence[ShardedMatrix],
    group: Any,
    costs: Sequence[float],
    work: Callable[[list[int], list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """``work(which, matrices)`` of whole matrices, on the rank that owns each, and of every result the rows that this
    rank has. All of one dtype and device. Every rank of the group must call this with the same matrices in order."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = owners(costs, ranks)
    each = [[i for i, owner in enumerate(mine) if owner == r] for r in range(ranks)]
    # To the owners: of each matrix the rows that this rank answers for.
    sent = [[_rows(cuts[i], cuts[i].shares[rank], cuts[i].shares[rank].sends) for i in each[r]] for r in range(ranks)]
    sizes = [sum(_length(cuts[i].shares[r].sends) * cuts[i].cols for i in each[rank]) for r in range(ranks)]
    arrived = _exchange(sent, sizes, cuts[0].x, group)
    whole = [cuts[i].x.new_empty(cuts[i].rows, cuts[i].cols) for i in each[rank]]
    for r, flat in enumerate(arrived):
        at = 0
        for i, x in zip(each[rank], whole, strict=True):
            start, stop = cuts[i].shares[r].sends
            numel = (stop - start) * cuts[i].cols
            x[start:stop] = flat[at : at + numel].view(stop - start, cuts[i].cols)
            at += numel
    del arrived
    done = work(each[rank], whole)
    del whole
    # And back: the rows that each rank has.
    back = [[done[n][slice(*cuts[i].shares[r].has)] for n, i in enumerate(each[rank])] for r in range(ranks)]
    sizes = [sum(_length(cuts[i].shares[rank].has) * cuts[i].cols for i in each[r]) for r in range(ranks)]
    arrived = _exchange(back, sizes, cuts[0].x, group)
    found: list[Any] = [None] * len(cuts)
    for r, flat in enumerate(arrived):
        at = 0
        for i in each[r]:
            rows = _length(cuts[i].shares[rank].has)
            found[i] = flat[at : at + rows * cuts[i].cols].view(rows, cuts[i].cols)
            at += rows * cuts[i].cols
    return found


def _length(span: RowRange) -> int:
    return span[1] - span[0]


def _rows(cut: ShardedMatrix, share: Share, span: RowRange) -> Tensor:
    """These rows of the matrix, of which ``share.has`` are here."""
    first = share.has[0]
    return cut.x[span[0] - first : span[1] - first]


def _exchange(sent: Sequence[Sequence[Tensor]], sizes: Sequence[int], like: Tensor, group: Any) -> list[Tensor]:
    """One all-to-all of bytes: what goes to each rank, and how many elements come from each. Flat, by rank."""
    import torch
    import torch.distributed as dist

    # State and its step may be on the host while the group is one of cards alone (NCCL).
    device = torch.device("cuda") if like.is_cpu and dist.get_backend(group) == "nccl" else like.device
    parts = [x.reshape(-1) for some in sent for x in some]
    out = (torch.cat(parts) if parts else like.new_empty(0)).to(device).view(torch.uint8)
    size = like.element_size()
    into = torch.empty(sum(sizes) * size, dtype=torch.uint8, device=device)
    counts = [sum(x.numel() for x in some) * size for some in sent]
    with answered("a step"):
        dist.all_to_all_single(into, out, [n * size for n in sizes], counts, group=group)
    return list(into.view(like.dtype).to(like.device).split(list(sizes)))
