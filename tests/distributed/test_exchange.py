"""Whole matrices by owner: what travels while what is worked on, the same bits in any number of turns, a bound on what
is there at once."""

import time
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakSet

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.partitions import exchange
from memopt.partitions.batched_allreduce import ParamUpdate, _buckets
from memopt.partitions.exchange import ShardedMatrix, Share, on_owners, owners, rounds_of
from memopt.partitions.zero1 import Zero1, buckets
from tests.helpers import ranks, resumed
from tests.helpers.cases import assert_same_bits

#: Rows that no number of ranks divides, fewer rows than ranks, several of one shape, one that is the largest.
SHAPES = [(33, 40), (2, 50), (64, 48), (33, 40), (1, 7), (70, 90), (64, 48), (33, 40)]
#: Of one size, so that all ranks have as many turns.
ALIKE = [(60, 50)] * 12
PATIENCE = 60


class Live(TorchDispatchMode):
    """The most bytes of tensors that were made under it and are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: WeakSet[torch.UntypedStorage] = WeakSet()
        self._known: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        for t in tensors(out):
            storage = t.untyped_storage()
            if storage.data_ptr() not in inputs:
                self._storages.add(storage)
        found = {s.data_ptr(): s.nbytes() for s in self._storages}
        self.most = max(self.most, sum(found.values()))
        return out


def tensors(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def cut(shapes, rank, world):
    """The rows of this rank of matrices that are the same everywhere."""
    found = []
    for n, shape in enumerate(shapes):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(n))
        bounds = [Zero1.rows(shape, r, world).bounds for r in range(world)]
        found.append(ShardedMatrix(x[slice(*bounds[rank])], shape[0], tuple(Share(b, b) for b in bounds)))
    return found


def doubled(which, whole):
    """Something that knows the whole matrix."""
    return [x * x.norm() for x in whole]


def solve(shapes, turns, work: Callable = doubled):
    exchange.ROUNDS, exchange.ROUND_NUMEL = turns, 1
    mine = cut(shapes, dist.get_rank(), dist.get_world_size())
    with Live() as live:
        found = on_owners(mine, dist.group.WORLD, [float(n * m) for n, m in shapes], work)
    solve.most = live.most
    return found


def in_turns():
    return [solve(SHAPES, turns) for turns in (1, 2, 4, 8)]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_turns_is_the_same_result(world):
    for rank, found in enumerate(ranks.run(in_turns, world)):
        for results in found:
            for n, (shape, x) in enumerate(zip(SHAPES, results, strict=True)):
                whole = torch.randn(shape, generator=torch.Generator().manual_seed(n))
                assert torch.equal(x, (whole * whole.norm())[slice(*Zero1.rows(shape, rank, world).bounds)])


def optimizers_in_turns(runs):
    exchange.ROUND_NUMEL = 1
    return resumed.run(runs)


def test_optimizers_step_as_one_process_in_many_turns():
    """To the bit, on the kernels and on the plain path (NorMuon)."""
    runs = [("muon-8bit/zero1", {}), ("muon/zero1", {"beta2": 0.95})]
    alone = resumed.run(runs)
    for rank in ranks.run(optimizers_in_turns, 2, runs):
        for found, expected in zip(rank, alone, strict=True):
            for name, p in expected["model"].items():
                assert_same_bits(found["model"][name], p)


def traced():
    """The order of what a rank does; while it works it waits until all that it has sent off has arrived."""
    said, sent = [], []
    begin = dist.all_to_all_single

    def sending(*arguments, **keywords):
        work = begin(*arguments, **keywords)
        n = len(sent)
        sent.append(work)
        said.append(f"begin {n}")

        class Handle:
            def wait(self):
                said.append(f"wait {n}")
                work.wait()

        return Handle()

    def work(which, whole):
        said.append("work")
        until = time.monotonic() + PATIENCE
        while not all(one.is_completed() for one in sent):
            assert time.monotonic() < until, "what was sent off does not arrive while a rank works"
            time.sleep(0.001)
        return doubled(which, whole)

    dist.all_to_all_single = sending
    solve(ALIKE, 3, work)
    return said


def test_one_turn_travels_while_another_is_worked_on():
    """Of three turns, on every rank: the next one's matrices (begin 1, begin 3) come during the work on this one's, and
    the results of the last (begin 2, begin 4) go back. What was sent off has arrived when the work is done, though
    nobody has waited for it."""
    expected = ["begin 0", "wait 0", "begin 1", "work", "begin 2", "wait 1", "begin 3", "work", "wait 2", "begin 4"]
    expected += ["wait 3", "work", "wait 4", "begin 5", "wait 5"]
    for said in ranks.run(traced, 2):
        assert said == expected


def alive():
    found = []
    for turns in (1, 2, 3, 4):
        nbytes = sum(x.numel() * x.element_size() for x in solve(ALIKE, turns))
        found.append(solve.most / nbytes)
    return found


def test_what_is_there_at_once_is_bounded():
    """Beside the results six times a turn's share of them: what comes, sent and received, what is worked on and what
    is made of it, what goes back and one more of a result or a matrix while it is put together."""
    for most in ranks.run(alive, 2):
        assert all(one <= 1 + 6 / turns for turns, one in enumerate(most, start=1)), most
        assert most[3] <= 0.6 * most[0], most


def failing(where):
    """Rank 1 fails in the middle of the work, with matrices under way; what rank 0 says then."""

    def work(which, whole):
        work.calls += 1
        if dist.get_rank() == 1 and work.calls == where:
            raise MemoryError("no room")
        return doubled(which, whole)

    work.calls = 0
    try:
        solve(ALIKE, 3, work)
    except MemoryError as error:
        with suppress(Exception):
            torch.distributed.destroy_process_group()
        return str(error)
    except RuntimeError as error:
        return str(error)


@pytest.mark.slow
def test_a_rank_that_fails_in_the_middle_of_its_work():
    others, mine = ranks.run(failing, 2, 2)
    assert mine == "no room"
    assert others.startswith("another rank has ended or does not answer, in the middle of a step")


def test_large_matrices_are_stepped_so_many_at_once_that_every_rank_has_some():
    """Of 256 MiB each on four ranks: two for each. What goes round behind them does so in pieces as before."""
    kinds, nbytes = ["a"] * 20, [2**28] * 20
    assert buckets(nbytes, kinds) == [(i, i + 1) for i in range(20)]
    assert buckets(nbytes, kinds, [2 * 4 * 2**28] * 20) == [(0, 8), (8, 16), (16, 20)]
    updates = [ParamUpdate(run=print, groups=(0,), numel=2**24, device=torch.device("cpu"), whole=2**26)] * 20
    assert [len(bucket) for bucket in _buckets(updates)] == [8, 8, 4]


def test_ranks_have_as_many_turns_whatever_they_own():
    sizes = [100, 1, 1, 1, 1]
    each = [[i for i, r in enumerate(owners([float(n) for n in sizes], 2)) if r == rank] for rank in range(2)]
    assert each == [[0], [1, 2, 3, 4]]
    exchange_turns = rounds_of(each, [2**20 * n for n in sizes])
    assert len(exchange_turns) == 4
    assert sorted(i for turn in exchange_turns for some in turn for i in some) == [0, 1, 2, 3, 4]
    assert rounds_of([[], []], []) == [[[], []]]
