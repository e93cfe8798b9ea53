"""Gradient release on two ranks: FSDP2's gradients are released, those of replicas refused."""

import warnings

import pytest
import torch
from torch import nn

import memopt
from tests.helpers import ranks
from tests.helpers.cases import assert_same_bits


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(67, 67) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().mean()


def sharded_steps(spec, release, max_norm, poison=False):
    """Whole parameters after three steps in which each rank has its own batch."""
    import torch.distributed as dist

    torch.manual_seed(0)
    model = Blocks()
    memopt.shard(model, spec)
    opt = memopt.create(model, spec, lr=1e-2)
    if release:
        opt.release_gradients(model, max_norm=max_norm)
    seen = []
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        x = torch.randn(8, 67)
        if poison and step == 1 and dist.get_rank() == 1:
            x[0] = float("nan")
        loss = model(x)
        if release and max_norm:
            loss.backward(retain_graph=True)
        loss.backward()
        seen.append(sum(p.grad is not None for p in model.parameters()))
        if not release and max_norm:
            memopt.clip_grad_norm_(opt, max_norm)
        opt.step()
        opt.zero_grad()
    return [p.full_tensor().detach() for p in model.parameters()], seen, opt.skipped_steps


SHARDED = [("adamw-8bit/zero3", None), ("adafactor/zero2", None), ("adamw/zero3", 0.01)]


def on_two_ranks():
    """Released and plain steps under FSDP2; and what is said under DistributedDataParallel, and of a model that every
    rank has whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = [[sharded_steps(spec, release, norm) for release in (False, True)] for spec, norm in SHARDED]
        poisoned = sharded_steps("adamw/zero3", True, None, poison=True)
    said = []
    for wrap in (nn.parallel.DistributedDataParallel, lambda m: m):
        model = nn.Linear(3, 2)
        opt = memopt.create(model, "adamw")
        try:
            opt.release_gradients(wrap(model))
        except RuntimeError as error:
            said.append(str(error))
    return pairs, poisoned, said


@pytest.fixture(scope="module")
def two_ranks():
    return ranks.run(on_two_ranks, 2)


@pytest.mark.parametrize("i", range(len(SHARDED)), ids=[spec for spec, _ in SHARDED])
def test_sharded_parameters_are_those_of_the_plain_step(two_ranks, i):
    for pairs, _, _ in two_ranks:
        (plain, gradients, _), (released, none, _) = pairs[i]
        assert set(gradients) == {6}
        assert set(none) == {0}
        for p, q in zip(plain, released, strict=True):
            assert_same_bits(p, q)


def test_a_nan_on_one_rank_skips_its_parameters_on_both(two_ranks):
    (_, (first, _, skipped), _), (_, (second, _, _), _) = two_ranks
    assert skipped == 1
    for p, q in zip(first, second, strict=True):
        assert p.isfinite().all()
        assert_same_bits(p, q)


def test_replicas_are_refused_with_the_reason(two_ranks):
    for _, _, said in two_ranks:
        assert "under DistributedDataParallel: it averages them" in said[0]
        assert "weight is whole on each of 2 ranks" in said[1]
