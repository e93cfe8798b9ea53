"""``@cpu`` with ``offload_gradients=True``: gradients go to the host in the middle of ``backward()`` and leave the
device, and everything that is done with gradients gives what it gives on the device. The device is simulated."""

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import simulated
import torch
from cases import HYPER, assert_same_bits, live_nbytes, odd_model, train
from offloading import OPTIONS, Deep, twins
from test_placements import assert_same
from torch import nn

import memopt
from estimators import estimate
from memopt.hyper import SpecError
from memopt.placements import bus
from memopt.placements.away import Away

SPECS = ["adamw@cpu", "adamw-8bit@cpu", "adafactor-8bit@cpu", "lion-4bit@cpu", "sgd@cpu", "lookahead(adamw)-8bit@cpu"]


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_and_state_are_those_of_device(either, spec):
    (model, opt), twin = twins(spec)
    for pair in ((model, opt), twin):
        train(*pair, 0, 4)
    assert_same((model, opt), twin)
    assert all(isinstance(p.grad, Away) for p in model.parameters())
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_backward_passes_are_added_as_on_the_device(either, dtype):
    (model, opt), twin = twins("adamw@cpu", lambda: Deep(dtype))
    for m, o in ((model, opt), twin):
        for step in range(3):
            o.zero_grad()
            for part in range(3):
                (m(10 * step + part) / 3).backward()
            o.step()
    assert_same((model, opt), twin)
    for p, q in zip(model.parameters(), twin[0].parameters(), strict=True):
        assert_same_bits(p.grad.on_host(), q.grad)
    if isinstance(either, simulated.Bus):
        assert len(either.clock.of("apart")) >= 3 * 2 * 8 * (2 if dtype is torch.float32 else 1)  # in pieces


def test_a_buffer_is_not_filled_again_before_what_is_in_it_is_added(monkeypatch):
    """Five gradients may be on the way, and there are four buffers."""
    made = simulated.ThreadedBus(beside=0.01)
    monkeypatch.setitem(bus.BUSES, "cpu", lambda where: made)
    (model, opt), twin = twins("adamw@cpu", lambda: Deep(width=224))
    for m, _ in ((model, opt), twin):
        for seed in range(3):
            m(seed).backward()
    assert opt.homes.of("").buffers.number == 4
    for p, q in zip(model.parameters(), twin[0].parameters(), strict=True):
        assert_same_bits(p.grad.on_host(), q.grad)


@pytest.mark.parametrize("clip", ["of memopt", "of memopt, by parameters", "of torch", "of torch, by value"])
def test_clipping(either, clip):
    (model, opt), twin = twins("adamw@cpu")
    norms = []
    for m, o in ((model, opt), twin):
        for step in range(3):
            o.zero_grad()
            m(step).backward()
            if clip == "of memopt":
                norms.append(float(memopt.clip_grad_norm_(o, 0.05)))
            elif clip == "of memopt, by parameters":
                norms.append(float(memopt.clip_grad_norm_(m.parameters(), 0.05)))
            elif clip == "of torch":
                norms.append(float(nn.utils.clip_grad_norm_(m.parameters(), 0.05)))
            else:
                nn.utils.clip_grad_value_(m.parameters(), 1e-4)
            o.step()
    assert norms[:3] == norms[3:]
    assert clip == "of torch, by value" or min(norms) > 0.05
    assert_same((model, opt), twin)


def test_grad_scaler_unscales_on_the_host_and_skips(either):
    (model, opt), twin = twins("adamw@cpu", Deep)
    seen = []
    for m, o in ((model, opt), twin):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(5):
            o.zero_grad()
            scaler.scale(m(step) * (float("inf") if step == 2 else 1.0)).backward()
            if step % 2:
                scaler.unscale_(o)
                memopt.clip_grad_norm_(o, 1e-4)
            scaler.step(o)
            scaler.update()
        seen.append(scaler.get_scale())
    assert seen[0] == seen[1]
    assert float(opt.state[model.layers[0].weight]["step"]) == 4
    assert_same((model, opt), twin)


def test_whoever_drops_a_gradient_drops_it(either):
    (model, opt), twin = twins("sgd@cpu")
    drops = [
        lambda m, o: o.zero_grad(),
        lambda m, o: o.zero_grad(set_to_none=False),
        lambda m, o: m.zero_grad(),
        lambda m, o: [setattr(p, "grad", None) for p in m.parameters()],
    ]
    for m, o in ((model, opt), twin):
        for step, drop in enumerate(drops):
            m(100 + step).backward()
            drop(m, o)
            m(step).backward()
            if step == 1:
                m.vector.grad = None  # this parameter does not step
            if step == 2:
                m.vector.grad = torch.ones_like(m.vector)  # somebody's own
            o.step()
            o.zero_grad(set_to_none=step != 3)
    assert_same((model, opt), twin)
    assert float(model.vector.grad.on_host().abs().sum()) == 0


def test_a_closure_schedules_save_load_copies(device):
    (model, opt), twin = twins("adamw-8bit@cpu")
    for m, o in ((model, opt), twin):
        rates = torch.optim.lr_scheduler.StepLR(o, 2, 0.5)
        for step in range(5):

            def closure(m=m, o=o, step=step):
                o.zero_grad()
                loss = m(step)
                loss.backward()
                return loss

            assert float(o.step(closure).detach()) > 0
            rates.step()
            if o is opt and step == 2:
                o.load_state_dict(o.state_dict())
    assert_same((model, opt), twin)
    copies = copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))
    train(*twin, 5, 2)
    for m, o in copies:
        m.head.weight = m.embedding.weight
        train(m, o, 5, 2)
        assert isinstance(m.vector.grad, Away)
        assert_same((m, o), twin)


def test_nan_skips_the_step(device):
    (model, opt), twin = twins("adamw@cpu")
    for m, o in ((model, opt), twin):
        train(m, o, 0, 1)
        o.zero_grad()
        (m(1) + (m.vector * float("nan")).sum()).backward()
        with pytest.warns(UserWarning, match="NaN or Inf in the gradient of vector"):
            o.step()
        train(m, o, 2, 1)
    assert opt.skipped_steps == 1
    assert_same((model, opt), twin)


def test_converted_between_backward_and_step_nothing_is_lost(either):
    (model, opt), twin = twins("adamw@cpu")
    there = [("adamw@device", {}), ("adamw@cpu", {"offload_gradients": True}), ("adamw@cpu", {"workspace": "2MiB"}),
             ("adamw@host", {"offload_gradients": None}), ("adamw@cpu", {"offload_gradients": False})]  # fmt: skip
    for m, o in ((model, opt), twin):
        for step, (spec, options) in enumerate(there):
            o.zero_grad()
            m(step).backward()
            if o is opt:
                given = {k: v for k, v in options.items() if v is not None}
                o.convert_(spec, **given)
                assert not isinstance(m.vector.grad, Away), spec
            o.step()
    assert_same((model, opt), twin)


def test_some_parameters(device):
    (model, opt), twin = twins("adamw@cpu", overrides={"embed*": "@device", "wide.*": "8bit"})
    twin[1].convert_("adamw", overrides={"wide.*": "8bit"})
    for pair in ((model, opt), twin):
        train(*pair, 0, 3)
    assert_same((model, opt), twin)
    assert isinstance(model.wide.weight.grad, Away)
    assert not isinstance(model.embedding.weight.grad, Away)
    memopt.clip_grad_norm_(opt, 1.0)
    opt.add_param_group({"params": [("more", nn.Parameter(torch.ones(4096)))]})
    p = opt.param_groups[1]["params"][0]
    p.square().sum().backward()
    assert isinstance(p.grad, Away)
    opt.step()


def test_what_cannot_be_done_says_why(device):
    (model, opt), _ = twins("adamw@cpu")
    model(0).backward()
    g = model.vector.grad
    for act in (lambda: g + 1, lambda: g.detach(), lambda: g.data, lambda: g.view(-1), lambda: torch.stack([g]),
                lambda: g[0], lambda: torch.add(torch.ones(4097), g)):  # fmt: skip
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
        ("adamw@cpu", {"offload_gradients": 1}, r"offload_gradients=1 is not allowed; it is True or False"),
        ("adamw@cpu/zero1", {"offload_gradients": True}, r"for parameters of one process, and this spec is /zero1"),
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
    with pytest.raises(RuntimeError, match=r"is trained by 2 ranks, .*offload_gradients=True is for one process"):
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


def test_watching_reads_them(device):
    (model, opt), twin = twins("adamw-8bit@cpu")
    reports = []
    for m, o in ((model, opt), twin):
        watch = memopt.watch(o, every=1)
        for step in range(4):
            o.zero_grad()
            loss = m(step)
            loss.backward()
            watch.loss(loss)
            o.step()
        reports.append(str(watch.report()))
    assert reports[0] == reports[1]


def test_optimizers_and_models_that_nobody_refers_to_are_gone(device):
    (model, opt), _ = twins("adamw@cpu")
    train(model, opt, 0, 2)
    model(3).backward()
    model(4).backward()
    gone = weakref.ref(model.vector), weakref.ref(opt)
    del opt
    model(5).backward()  # added without it too
    assert gone[1]() is None or gc.collect() >= 0
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
