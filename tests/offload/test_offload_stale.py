"""Copies of gradients that came down in ``backward()`` are used only while they are the gradients: whatever is done to
gradients after they were ready is what is stepped. The device is simulated."""

import pytest
import torch
from torch import nn

import memopt
from memopt.training.clip import grad_norm
from tests.helpers.cases import train
from tests.helpers.offloading import Deep, counts, early_twins
from tests.placements.test_placements import assert_same


def step(m, o, seed, between=lambda m: None, clear=True):
    if clear:
        o.zero_grad()
    m(seed).backward()
    between(m)
    o.step()


def through_data(m):
    for p in m.parameters():
        p.grad.data.mul_(0.5)


def replaced(m):
    for p in m.parameters():
        p.grad = p.grad * 0.5


def in_place_of(m):
    """Another tensor's memory under the same tensor."""
    for p in m.parameters():
        p.grad.data = p.grad.data * 0.5


def one_sign(m):
    for p in m.parameters():
        p.grad.data[-1, -1].neg_()


def again(m):
    for p in m.parameters():
        p.grad = None
    m(77).backward()


def none_of_some(m):
    for p in list(m.parameters())[::2]:
        p.grad = None


STALE = {
    "clipped by torch": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-3),
    "clipped by memopt": lambda m: memopt.clip_grad_norm_(m, 1e-3),
    "clipped by value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 1e-5),
    "written through .data": through_data,
    "one sign": one_sign,
    "replaced": replaced,
    "another memory": in_place_of,
    "another backward pass": again,
    "accumulated": lambda m: m(78).backward(),
    "zeroed": lambda m: [p.grad.zero_() for p in m.parameters()],
    "some are gone": none_of_some,
}


@pytest.mark.parametrize("arrived", [True, False])
@pytest.mark.parametrize("how", STALE)
def test_what_is_done_to_a_gradient_after_it_was_ready_is_what_is_stepped(either, how, arrived):
    """Before its copy was made or after."""
    (model, opt), twin = early_twins()

    def between(m):
        if m is model and arrived:
            opt.placement_stores.of("")._prefetch._wait()
        STALE[how](m)

    for m, o in ((model, opt), twin):
        step(m, o, 0)
        for seed in (1, 2):
            step(m, o, seed, between)
            step(m, o, 10 + seed)
    assert_same((model, opt), twin)


def test_what_is_written_before_the_copy_is_made_is_copied(device):
    """What torch does not count, and the copy has seen, is the gradient: it is used."""
    (model, opt), twin = early_twins()
    for m, o in ((model, opt), twin):
        step(m, o, 0)
        step(m, o, 1, through_data)
    assert counts(opt) == (8, 8)
    assert_same((model, opt), twin)


def test_clipping_that_has_nothing_to_clip_leaves_copies_what_they_are(either):
    """The norm is so large that what torch adds to it before it divides is lost: all are multiplied by 1."""
    (model, opt), twin = early_twins()
    for m, o in ((model, opt), twin):
        step(m, o, 0)
        for seed, scale in ((1, 1.0), (2, 1.0), (3, 0.5)):
            o.zero_grad()
            (1e6 * m(seed)).backward()
            if o is opt:
                opt.placement_stores.of("")._prefetch._wait()
            norm = float(grad_norm(m))
            before = [p.grad._version for p in m.parameters()]
            memopt.clip_grad_norm_(m, scale * norm)
            # Half the norm is written, the norm itself is not: nothing is to be clipped.
            assert [p.grad._version for p in m.parameters()] == [v + (scale < 1) for v in before]
            if seed == 2:
                m.layers[0].weight.grad.mul_(1.0)  # somebody else's is not excused
            o.step()
            assert o is not opt or counts(opt) == (8, {1: 8, 2: 7, 3: 0}[seed])
    assert_same((model, opt), twin)


@pytest.mark.filterwarnings("ignore:NaN or Inf in the gradient")
def test_a_scaler_and_nan(either):
    (model, opt), twin = early_twins()
    for m, o in ((model, opt), twin):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for seed in range(6):
            o.zero_grad()
            scaler.scale(m(seed) * (float("inf") if seed == 3 else 1.0)).backward()
            scaler.step(o)
            scaler.update()
    assert_same((model, opt), twin)
    for m, o in ((model, opt), twin):
        for seed in range(4):
            o.zero_grad()
            (m(seed) * (float("nan") if seed == 1 else 1.0)).backward()
            o.step()
    assert_same((model, opt), twin)


def test_tied_sparse_and_without_a_gradient(either):
    class Tied(Deep):
        def __init__(self):
            super().__init__(width=160)
            self.layers[3].weight = self.layers[0].weight
            self.unused = nn.Parameter(torch.ones(300, 300))

    (model, opt), twin = early_twins(make=Tied)
    for pair in ((model, opt), twin):
        train(*pair, 0, 4)
    assert_same((model, opt), twin)
    assert counts(opt) == (7, 7)
    model.table = nn.Embedding(300, 300, sparse=True)
    opt.add_param_group({"params": [("table", model.table.weight)]})
    for _ in range(2):
        model.table(torch.arange(300)).sum().backward()
        with pytest.raises(RuntimeError, match="table has a sparse gradient"):
            opt.step()
        model.table.weight.grad = None


def test_not_contiguous_gradients_come_down_in_the_step(device):
    def conv():
        return nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)

    (model, opt), twin = early_twins(make=conv)
    for m, o in ((model, opt), twin):
        for seed in range(3):
            o.zero_grad()
            x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(seed))
            m(x).square().sum().backward()
            m.weight.grad = m.weight.grad.contiguous(memory_format=torch.channels_last)
            o.step()
    assert_same((model, opt), twin)


def test_several_ranks_write_to_gradients_that_are_ready(device, monkeypatch):
    (model, opt), twin = early_twins()
    for pair in ((model, opt), twin):
        train(*pair, 0, 2)
    assert counts(opt) == (8, 8)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        opt.zero_grad()
        model(2).backward()
    opt.step()
    assert counts(opt) == (0, 0)
    assert "in the step, not in backward(): 2 processes average gradients after they are ready" in opt.explain()


def test_copies_that_are_always_in_vain_are_given_up(device):
    (model, opt), twin = early_twins()
    seen = []
    for m, o in ((model, opt), twin):
        for seed in range(5):
            step(m, o, seed, lambda m: m.layers[0].weight.grad.mul_(0.5))
            if o is opt:
                seen.append(counts(opt))
    assert seen == [(0, 0), (8, 7), (8, 7), (7, 7), (7, 7)]
    assert "; 1 are not copied there any more, something changed them after it in 2 steps running" in opt.explain()
    assert_same((model, opt), twin)
