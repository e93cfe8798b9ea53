"""Released gradients that go to the host: parameters step beside ``backward()``."""

import threading
import warnings

import pytest
import torch
from torch import nn

import memopt
from memopt.placements.gradients.host_grad import HostGradient
from memopt.placements.transfer import device
from tests.helpers import simulated
from tests.helpers.cases import assert_same_bits, odd_model, train
from tests.helpers.offloading import OPTIONS, Deep, twins
from tests.placements.test_placements import assert_same


def test_released_what_goes_wrong_beside_backward_is_said(either):
    model = odd_model()
    opt = memopt.create(model, "adamw@cpu", nonfinite="raise", **OPTIONS)
    opt.release_gradients(model)
    (model(0) + (model.vector * float("nan")).sum()).backward()
    with pytest.raises(FloatingPointError, match="NaN or Inf in the gradient of vector"):
        opt.step()
    assert not opt.state[model.vector]
    train(model, opt, 1, 1)


def test_released_nan_skips_its_parameter(either):
    model = odd_model()
    opt = memopt.create(model, "adamw@cpu", **OPTIONS)
    opt.release_gradients(model)
    before = model.vector.detach().clone()

    def step():
        (model(0) + (model.vector * float("nan")).sum()).backward()
        opt.step()

    with pytest.warns(UserWarning, match="NaN or Inf in the gradient of vector"):
        step()
    assert opt.skipped_steps == 1
    assert_same_bits(model.vector, before)
    assert float(opt.state[model.wide.weight]["step"]) == 1


def test_released_steps_beside_backward_are_those_of_device(either):
    (model, opt), twin = twins("adamw-8bit@cpu", Deep)
    opt.release_gradients(model)
    for pair in ((model, opt), twin):
        train(*pair, 0, 5)
    assert_same((model, opt), twin)


class OfOneThread(nn.Parameter):
    """Its gradient is backward()'s thread's: torch does not guard it against another."""

    @property
    def grad(self):
        assert threading.current_thread() is threading.main_thread()
        return torch.Tensor.grad.__get__(self)

    @grad.setter
    def grad(self, g):
        assert threading.current_thread() is threading.main_thread()
        torch.Tensor.grad.__set__(self, g)


def test_the_thread_beside_backward_leaves_gradients_of_parameters_alone(monkeypatch):
    made = simulated.ThreadedBus()
    monkeypatch.setitem(device.TRANSFERS, "cpu", lambda where: made)
    model, twin = Deep(), Deep()
    twin.load_state_dict(model.state_dict())
    for layer in model.layers:
        layer.weight = OfOneThread(layer.weight.detach())
    opt, reference = memopt.create(model, "adamw@cpu", **OPTIONS), memopt.create(twin, "adamw")
    for seed in range(4):
        if seed == 2:
            opt.release_gradients(model)
        for m, o in ((model, opt), (twin, reference)):
            for part in range(2 if seed < 2 else 1):
                m(10 * seed + part).backward()
            o.step()
            o.zero_grad()
    assert_same((model, opt), (twin, reference))


@pytest.mark.parametrize("poisoned", [False, True])
def test_released_those_that_have_come_are_stepped_together(monkeypatch, poisoned):
    """The thread beside backward() is late: when it steps, others have come."""
    made = simulated.ThreadedBus(beside=0.02)
    monkeypatch.setitem(device.TRANSFERS, "cpu", lambda where: made)
    (model, opt), twin = twins("adamw-8bit@cpu", Deep, workspace="8MiB")
    steps, real = [], opt.stepper.step_some
    monkeypatch.setattr(
        opt.stepper, "step_some", lambda some, *scales: (steps.append(len(some)), real(some, *scales))[1]
    )
    bad = [m.layers[3].weight for m in (model, twin[0])] if poisoned else []
    opt.release_gradients(model)
    twin[1].release_gradients(twin[0])
    for m, o in ((model, opt), twin):
        for p in bad:
            p.register_hook(lambda g: g * float("nan"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(m, o, 0, 3)
    assert_same((model, opt), twin)
    assert opt.skipped_steps == twin[1].skipped_steps == (3 if poisoned else 0)
    assert sum(steps) == 3 * (7 if poisoned else 8)
    assert max(steps) > 1


def test_released_with_a_norm_and_not_any_more(either):
    (model, opt), twin = twins("adamw@cpu", Deep)
    release, other = opt.release_gradients(model, max_norm=1e-4), twin[1].release_gradients(twin[0], max_norm=1e-4)
    for m, o in ((model, opt), twin):
        for step in range(3):
            loss = m(step)
            loss.backward(retain_graph=True)
            loss.backward()
            o.step()
    assert release.norm == other.norm > 1e-4
    assert_same((model, opt), twin)
    release.remove()
    other.remove()
    for pair in ((model, opt), twin):
        train(*pair, 3, 1)
    assert isinstance(model.layers[0].weight.grad, HostGradient)
    assert_same((model, opt), twin)
