"""Gradients that have left the device (``offload_gradients=True``): everything that is done with gradients gives what
it gives on the device. The device is simulated."""

import copy
import pickle

import pytest
import torch
from torch import nn

import memopt
from memopt.placements.gradients.host_grad import HostGradient
from tests.helpers import simulated
from tests.helpers.cases import assert_same_bits, train
from tests.helpers.offloading import Deep, twins
from tests.placements.test_placements import assert_same


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
    if isinstance(either, simulated.DeviceTransfer):
        assert len(either.clock.of("apart")) >= 3 * 2 * 8 * (2 if dtype is torch.float32 else 1)  # in pieces


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
        assert isinstance(m.vector.grad, HostGradient)
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
    there = [
        ("adamw@device", {}),
        ("adamw@cpu", {"offload_gradients": True}),
        ("adamw@cpu", {"workspace": "2MiB"}),
        ("adamw@host", {"offload_gradients": None}),
        ("adamw@cpu", {"offload_gradients": False}),
    ]
    for m, o in ((model, opt), twin):
        for step, (spec, options) in enumerate(there):
            o.zero_grad()
            m(step).backward()
            if o is opt:
                given = {k: v for k, v in options.items() if v is not None}
                o.convert_(spec, **given)
                assert not isinstance(m.vector.grad, HostGradient), spec
            o.step()
    assert_same((model, opt), twin)


def test_some_parameters(device):
    (model, opt), twin = twins("adamw@cpu", overrides={"embed*": "@device", "wide.*": "8bit"})
    twin[1].convert_("adamw", overrides={"wide.*": "8bit"})
    for pair in ((model, opt), twin):
        train(*pair, 0, 3)
    assert_same((model, opt), twin)
    assert isinstance(model.wide.weight.grad, HostGradient)
    assert not isinstance(model.embedding.weight.grad, HostGradient)
    memopt.clip_grad_norm_(opt, 1.0)
    opt.add_param_group({"params": [("more", nn.Parameter(torch.ones(4096)))]})
    p = opt.param_groups[1]["params"][0]
    p.square().sum().backward()
    assert isinstance(p.grad, HostGradient)
    opt.step()


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
