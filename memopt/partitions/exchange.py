"""Rows of many matrices to the ranks that work on them whole, and back: two all-to-alls for each turn of a bucket of
matrices, under way while another turn's are worked on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from memopt.partitions.world import answered

if TYPE_CHECKING:
    from torch import Tensor

#: Turns in which the matrices of a bucket travel and are worked on, at most; and elements of one on a rank, at least: a
#: small turn costs more in collectives than it saves in waiting.
ROUNDS = 4
ROUND_NUMEL = 2**18
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


def rounds_of(each: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[list[int]]]:
    """The matrices of each rank (``each``, by rank) in turns, one travelling while another is worked on: of every turn
    those of each rank. As many turns for all ranks, of which some may have nothing in one, and at most ``ROUNDS``.

    >>> rounds_of([[0, 1, 2], [3]], [2**20, 2**20, 2**20, 2**20])
    [[[0], []], [[1], [3]], [[2], []]]
    """
    totals = [sum(sizes[i] for i in some) for some in each]
    turns = max(1, min(ROUNDS, max(map(len, each)), -(-max(totals) // ROUND_NUMEL)))
    found: list[list[list[int]]] = [[[] for _ in each] for _ in range(turns)]
    for r, some in enumerate(each):
        before = 0
        for i in some:
            # Where its middle stands.
            found[min((2 * before + sizes[i]) * turns // max(2 * totals[r], 1), turns - 1)][r].append(i)
            before += sizes[i]
    return found


def on_owners(
    cuts: Sequence[ShardedMatrix],
    group: Any,
    costs: Sequence[float],
    work: Callable[[list[int], list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """``work(which, matrices)`` of whole matrices, on the rank that owns each, and of every result the rows that this
    rank has. All of one dtype and device. Every rank of the group must call this with the same matrices in order.

    In turns: while one turn's matrices are worked on, those of the next come, and the results of the one before go
    back. Never is more under way than that.
    """
    import torch.distributed as dist

    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = owners(costs, ranks)
    # Those of one shape beside each other: they are worked on in one batch.
    order = sorted(range(len(cuts)), key=lambda i: (cuts[i].rows, cuts[i].cols, i))
    each = [[i for i in order if mine[i] == r] for r in range(ranks)]
    turns = rounds_of(each, [cut.rows * cut.cols for cut in cuts])
    found: list[Any] = [None] * len(cuts)
    coming, going = _to_owners(cuts, turns[0], rank, group), None
    for n, turn in enumerate(turns):
        whole = coming.arrive()
        if n + 1 < len(turns):
            coming = _to_owners(cuts, turns[n + 1], rank, group)
        whole = _assembled(cuts, turn[rank], whole)
        done = work(turn[rank], whole)
        del whole
        if going is not None:
            _place(cuts, turns[n - 1], rank, going.arrive(), found)
        going = _back(cuts, turn, rank, done, group)
        del done
    assert going is not None
    _place(cuts, turns[-1], rank, going.arrive(), found)
    return found


def _to_owners(cuts: Sequence[ShardedMatrix], turn: Sequence[Sequence[int]], rank: int, group: Any) -> _Exchange:
    """To the owners: of each matrix the rows that this rank answers for."""
    sent = [[_rows(cuts[i], cuts[i].shares[rank], cuts[i].shares[rank].sends) for i in some] for some in turn]
    sizes = [sum(_length(cuts[i].shares[r].sends) * cuts[i].cols for i in turn[rank]) for r in range(len(turn))]
    return _Exchange(sent, sizes, cuts[0].x, group)


def _assembled(cuts: Sequence[ShardedMatrix], which: Sequence[int], arrived: Sequence[Tensor]) -> list[Tensor]:
    """The matrices of what every rank sent of them."""
    whole = [cuts[i].x.new_empty(cuts[i].rows, cuts[i].cols) for i in which]
    for r, flat in enumerate(arrived):
        at = 0
        for i, x in zip(which, whole, strict=True):
            start, stop = cuts[i].shares[r].sends
            numel = (stop - start) * cuts[i].cols
            x[start:stop] = flat[at : at + numel].view(stop - start, cuts[i].cols)
            at += numel
    return whole


def _back(
    cuts: Sequence[ShardedMatrix], turn: Sequence[Sequence[int]], rank: int, done: Sequence[Tensor], group: Any
) -> _Exchange:
    """To each rank the rows that it has."""
    sent = [[x[slice(*cuts[i].shares[r].has)] for i, x in zip(turn[rank], done, strict=True)] for r in range(len(turn))]
    sizes = [sum(_length(cuts[i].shares[rank].has) * cuts[i].cols for i in some) for some in turn]
    return _Exchange(sent, sizes, cuts[0].x, group)


def _place(
    cuts: Sequence[ShardedMatrix],
    turn: Sequence[Sequence[int]],
    rank: int,
    arrived: Sequence[Tensor],
    found: list[Any],
) -> None:
    """The rows here of what every owner made, to their places in ``found``."""
    for some, flat in zip(turn, arrived, strict=True):
        at = 0
        for i in some:
            rows = _length(cuts[i].shares[rank].has)
            found[i] = flat[at : at + rows * cuts[i].cols].view(rows, cuts[i].cols)
            at += rows * cuts[i].cols


def _length(span: RowRange) -> int:
    return span[1] - span[0]


def _rows(cut: ShardedMatrix, share: Share, span: RowRange) -> Tensor:
    """These rows of the matrix, of which ``share.has`` are here."""
    first = share.has[0]
    return cut.x[span[0] - first : span[1] - first]


class _Exchange:
    """One all-to-all of bytes under way: what goes to each rank, and how many elements come from each."""

    def __init__(self, sent: Sequence[Sequence[Tensor]], sizes: Sequence[int], like: Tensor, group: Any) -> None:
        import torch
        import torch.distributed as dist

        self._like, self._sizes = like, list(sizes)
        # State and its step may be on the host while the group is one of cards alone (NCCL).
        device = torch.device("cuda") if like.is_cpu and dist.get_backend(group) == "nccl" else like.device
        parts = [x.reshape(-1) for some in sent for x in some]
        # Both are alive until all has been sent and received.
        self._out = (torch.cat(parts) if parts else like.new_empty(0)).to(device).view(torch.uint8)
        size = like.element_size()
        self._into = torch.empty(sum(sizes) * size, dtype=torch.uint8, device=device)
        counts = [sum(x.numel() for x in some) * size for some in sent]
        comes = [n * size for n in sizes]
        with answered("a step"):
            self._work = dist.all_to_all_single(self._into, self._out, comes, counts, group=group, async_op=True)

    def arrive(self) -> list[Tensor]:
        """Wait; what came, flat, by rank."""
        with answered("a step"):
            self._work.wait()
        return list(self._into.view(self._like.dtype).to(self._like.device).split(self._sizes))
