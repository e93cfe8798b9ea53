"""``@cpu`` with ``offload_gradients=True``: gradients go to the host in the middle of ``backward()`` and leave the
device: bits, bytes, and what is refused. What is done with such gradients is in ``test_offload_used.py``. The device is
simulated."""

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch
from torch import nn

import memopt
from estimators import estimate
from memopt.core.hyperparameters import SpecError
from memopt.placements.gradients.host_grad import HostGradient
from memopt.placements.transfer import device as transfer
from tests.helpers import simulated
from tests.helpers.cases import HYPER, assert_same_bits, live_nbytes, odd_model, train
from tests.helpers.offloading import OPTIONS, SPECS, Deep, twins
from tests.placements.test_placements import assert_same


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_and_state_are_those_of_device(either, spec):
    (model, opt), twin = twins(spec)
    for pair in ((model, opt), twin):
        train(*pair, 0, 4)
    assert_same((model, opt), twin)
    assert all(isinstance(p.grad, HostGradient) for p in model.parameters())
    for p, q in zip(model.parameters(), twin[0].parameters(), strict=True):
        assert_same_bits(p.grad.on_host(), q.grad)
    predicted = memopt.price(model, spec, device="cuda", **HYPER.get(memopt.parse(spec).rule, {}), **OPTIONS)
    assert opt.ledger() == predicted
    assert live_nbytes(opt) == predicted.nbytes
    assert opt.ledger().by("moment")["gradients"] == sum(4 * p.numel() for p in model.parameters())
    assert "gradients go to pinned memory in backward(), and leave the device" in opt.explain()


def test_bf16_with_a_master_and_prices_in_bf16(device):
    (model, opt), twin = twins("adamw-8bit+split@cpu", lambda: Deep(torch.bfloat16))
    for pair in ((model, opt), twin):
        train(*pair, 0, 3)
    assert_same((model, opt), twin)
    assert opt.ledger() == memopt.price(model, opt.spec, device="cuda")
    assert opt.ledger().by("moment")["gradients"] == 2 * 8 * 320 * 320


def test_a_buffer_is_not_filled_again_before_what_is_in_it_is_added(monkeypatch):
    """Five gradients may be on the way, and there are four buffers."""
    made = simulated.ThreadedBus(beside=0.01)
    monkeypatch.setitem(transfer.TRANSFERS, "cpu", lambda where: made)
    (model, opt), twin = twins("adamw@cpu", lambda: Deep(width=224))
    for m, _ in ((model, opt), twin):
        for seed in range(3):
            m(seed).backward()
    assert opt.placement_stores.of("").buffers.number == 4
    for p, q in zip(model.parameters(), twin[0].parameters(), strict=True):
        assert_same_bits(p.grad.on_host(), q.grad)


def test_what_cannot_be_done_says_why(device):
    (model, opt), _ = twins("adamw@cpu")
    model(0).backward()
    g = model.vector.grad
    for act in (
        lambda: g + 1,
        lambda: g.detach(),
        lambda: g.data,
        lambda: g.view(-1),
        lambda: torch.stack([g]),
        lambda: g[0],
        lambda: torch.add(torch.ones(4097), g),
    ):
        with pytest.raises(RuntimeError, match=r"the gradient of vector: it is in host memory .*p\.grad\.on_host\(\)"):
            act()
    for act in (lambda: copy.deepcopy(g), lambda: pickle.dumps(g)):
        with pytest.raises(TypeError, match="gradient of vector is in host memory and is not saved"):
            act()
    assert "gradient of vector" in repr(g)
    assert_same_bits(g.clone(), g.on_host())
    assert float(g.norm()) == float(g.on_host().norm())
    opt.zero_grad()
    model(1).backward()
    with pytest.raises(RuntimeError, match="this gradient of vector is gone"):
        g.on_host()


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("adamw", {"offload_gradients": True}, r"offload_gradients=True is for @cpu; this spec is @device"),
        ("adamw@host", {"offload_gradients": True}, r"offload_gradients=True is for @cpu; this spec is @host"),
        ("adamw@cpu", {"offload_gradients": 1}, r"offload_gradients=1 is not allowed; it is True, False or 'early'"),
        ("adamw@cpu/zero1", {"offload_gradients": "early"}, r"='early' is not for /zero1: .*shard them, '/zero2'"),
        ("adamw@cpu/zero1", {"offload_gradients": True}, r"=True is not for /zero1: DistributedDataParallel keeps"),
    ],
)
def test_where_it_means_nothing_it_is_refused(spec, options, words):
    for make in (memopt.create, memopt.price):
        with pytest.raises(SpecError, match=words):
            make(nn.Linear(2, 2), spec, **options)


def test_several_ranks_are_refused_in_backward(device, monkeypatch):
    """The spec does not know of DistributedDataParallel."""
    made = twins("adamw@cpu")  # an optimizer that nobody refers to leaves gradients alone
    model = made[0][0]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"is whole on each of 2 ranks, .*offload_gradients is for one process, and"):
        model(0).backward()
    monkeypatch.undo()
    assert any(type(p.grad) is torch.Tensor for p in model.parameters())


def test_parameters_in_host_memory_keep_their_gradients_and_explain_says_so():
    model, twin = odd_model(), odd_model()
    opt, reference = memopt.create(model, "adamw@cpu", offload_gradients=True), memopt.create(twin, "adamw")
    train(model, opt, 0, 3)
    train(twin, reference, 0, 3)
    assert_same((model, opt), (twin, reference))
    assert type(model.vector.grad) is torch.Tensor
    assert "gradients too: offload_gradients has nothing to do" in opt.explain()
    assert opt.ledger() == memopt.price(model, opt.spec)
    assert "gradients" not in opt.ledger().by("moment")


def test_optimizers_and_models_that_nobody_refers_to_are_gone(device):
    (model, opt), _ = twins("adamw@cpu")
    train(model, opt, 0, 2)
    model(3).backward()
    model(4).backward()
    gone = weakref.ref(model.vector), weakref.ref(opt)
    del opt
    model(5).backward()  # added without it too
    gc.collect()
    assert gone[1]() is None
    del model
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None


@pytest.mark.parametrize("overrides", [{}, {"embed*": "@device"}])
def test_the_estimate_is_the_ledger_and_the_device_keeps_few(device, overrides):
    (model, opt), _ = twins("adamw@cpu", overrides=overrides)
    train(model, opt, 0, 1)
    rows = estimate(model, "adamw@cpu", overrides=overrides, **OPTIONS).rows
    held = Counter()
    for row in rows:
        if row.what == "state":
            held[row.detail] += row.nbytes  # in each tier
    assert held == opt.ledger().by("moment")
    sizes = {name: 4 * p.numel() for name, p in model.named_parameters()}
    stays = sizes["embedding.weight"] if overrides else 0
    assert held["gradients"] == sum(sizes.values()) - stays
    there = {row.detail: (row.nbytes, row.phases) for row in rows if row.what == "gradients"}
    assert there.pop("on their way to the host") == (held["gradients"], ("backward",))  # less than the workspace
    assert there == ({"float32": (stays, ("backward", "step"))} if stays else {})
    large = estimate("llama-3.1-8b", "adamw@cpu", offload_gradients=True, seq=512).rows
    (way,) = (row for row in large if row.what == "gradients")
    largest = 2 * 128_256 * 4096  # the table, larger than a workspace of 256 MiB
    assert (way.nbytes, way.low, way.phases) == (2 * largest, largest, ("backward",))
