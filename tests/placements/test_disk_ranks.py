"""A directory of ``@disk`` on two ranks, of which one commits and the other does not: both go on from one commit."""

from __future__ import annotations

import errno
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import memopt
from memopt.placements.stores.atomic_record import Journal
from tests.helpers import ranks
from tests.helpers.cases import assert_same_bits

State = list[dict[str, Tensor]]


def made(directory: str) -> tuple[list[nn.Parameter], memopt.Optimizer]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in [(130, 67), (9,)]]
    return params, memopt.create(params, "adamw-8bit@disk/zero1", directory=directory, workspace="1MiB")


def step(params: list[nn.Parameter], opt: memopt.Optimizer, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)
    opt.step()


def state_of(opt: memopt.Optimizer) -> State:
    return [
        {k: x.clone() for k, x in opt.state[p].items()} if opt.state.get(p) else {}
        for p in opt.param_groups[0]["params"]
    ]


#: What is committed by rank 0 alone.
WORKS: dict[str, Callable[[list[nn.Parameter], memopt.Optimizer], Any]] = {
    "step": lambda params, opt: step(params, opt, 9),
    "reset_state": lambda params, opt: opt.reset_state(),
    "append_rows": lambda params, opt: opt.append_rows(params[0], torch.zeros(40, 67)),
    "init_state(anew=True)": lambda params, opt: opt.init_state(anew=True),
    "the first step": lambda params, opt: step(params, opt, 9),
}


def on_two_ranks() -> dict[str, Any]:
    rank = dist.get_rank()
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders, 0)
    found: dict[str, Any] = {what: one_commits(f"{folders[0]}/{i}", what, rank) for i, what in enumerate(WORKS)}
    return {**found, "different runs": different_runs(folders[0], rank)}


def one_commits(directory: str, what: str, rank: int) -> tuple[str, str, State, State, State, State]:
    params, opt = made(directory)
    for seed in range(0 if "first" in what else 2):
        step(params, opt, seed)
    before = state_of(opt)
    write = Journal.write

    def full(self: Journal, record: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    said = ""
    if rank == 1:
        Journal.write = full  # type: ignore[method-assign]
    try:
        WORKS[what](params, opt)
    except OSError as error:
        said = str(error)
    Journal.write = write  # type: ignore[method-assign]
    opt.close()
    params, opt = made(directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.init_state()
    told = " ".join(str(one.message) for one in caught)
    found = state_of(opt)
    step(params, opt, 5)
    further = state_of(opt)
    opt.close()
    params, opt = made(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.init_state()
    return said, told, before, found, further, state_of(opt)


@ranks.once
def session() -> list[dict[str, Any]]:
    return ranks.run(on_two_ranks, 2)


@pytest.mark.parametrize("what", WORKS)
def test_a_commit_that_one_rank_has_not_made_is_undone_on_all(what):
    for rank, found in enumerate(session()):
        said, told, before, after, further, again = found[what]
        assert ("could not be committed" in said) == (rank == 1)
        if "first" in what:
            assert not told
            assert all(not x.any() for state in after for x in state.values())
        else:
            assert "a later step had been committed by some ranks and not by others, and is undone" in told
            _same(after, before)
        assert all(state["step"] == len([s for s in before if s]) + 1 for state in further)
        _same(again, further)


def _same(a: State, b: State) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for key, x in one.items():
            assert_same_bits(x, other[key], key)


def different_runs(folder: str, rank: int) -> str:
    for steps in (1, 4):
        params, opt = made(f"{folder}/of {steps} steps")
        for seed in range(steps):
            step(params, opt, seed)
        opt.close()
    try:
        made(f"{folder}/of {[1, 4][rank]} steps")
    except RuntimeError as error:
        return str(error)
    return ""


def test_commits_of_different_runs_are_refused_on_all_ranks():
    for found in session():
        said = found["different runs"]
        assert "no commit is one of every rank" in said
        assert "Give another directory, and load a checkpoint" in said
