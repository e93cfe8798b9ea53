"""``@cpu`` as it is without options: gradients are copied to the host in the middle of ``backward()`` and stay on the
device. The device is simulated."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import memopt
from memopt.placements.gradients import prefetch
from tests.helpers.cases import HYPER, live_nbytes, odd_model, train
from tests.helpers.offloading import SPECS, Deep, counts, early_twins, on_clock
from tests.placements.test_placements import assert_same


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("workspace", ["1MiB", "8MiB"])
def test_parameters_and_state_are_those_of_device(either, spec, workspace):
    (model, opt), twin = early_twins(spec, odd_model, workspace=workspace)
    for pair in ((model, opt), twin):
        train(*pair, 0, 5)
    assert_same((model, opt), twin)
    assert all(type(p.grad) is torch.Tensor for p in model.parameters())
    made, used = counts(opt)
    assert made == used > 0
    predicted = memopt.price(model, opt.spec, device="cuda", **HYPER.get(memopt.parse(spec).rule, {}))
    assert opt.ledger() == predicted
    assert live_nbytes(opt) == predicted.nbytes
    assert predicted == memopt.price(
        model,
        spec,
        device="cuda",
        workspace=workspace,
        offload_gradients=False,
        **HYPER.get(memopt.parse(spec).rule, {}),
    )
    assert f"in the last one {made} had been copied, and {used} were still the gradient" in opt.explain()


def test_bf16_with_a_master(either):
    (model, opt), twin = early_twins("adamw-8bit+split@cpu", lambda: Deep(torch.bfloat16))
    for pair in ((model, opt), twin):
        train(*pair, 0, 4)
    assert_same((model, opt), twin)
    assert counts(opt) == (8, 8)


def test_accumulation_copies_the_last_only(device):
    (model, opt), twin = early_twins()
    on_clock(device, model)
    made = []
    for m, o in ((model, opt), twin):
        for seed in range(4):
            before = len(device.clock.of("down"))
            for part in range(3):
                (m(10 * seed + part) / 3).backward()
            made.append(len(device.clock.of("down")) - before)
            o.step()
            o.zero_grad()
    assert made[:4] == [0, 3 * 8, 8, 8]  # by the second step it does not know yet
    assert counts(opt) == (8, 8)
    assert_same((model, opt), twin)


def test_only_in_the_step(device):
    (model, opt), twin = early_twins(offload_gradients=False)
    on_clock(device, model)
    for pair in ((model, opt), twin):
        train(*pair, 0, 3)
    assert_same((model, opt), twin)
    clock = device.clock
    assert not any(op.begin < b.end and b.begin < op.end for op in clock.of("down") for b in clock.of("backward"))
    assert "; gradients come down in the step" in opt.explain()


def test_released_converted_copied(device):
    (model, opt), twin = early_twins("adamw-8bit@cpu", Deep)
    for m, o in ((model, opt), twin):
        train(m, o, 0, 2)
        release = o.release_gradients(m)
        train(m, o, 2, 2)
        release.remove()
        train(m, o, 4, 2)
        assert o is not opt or counts(opt)[1] > 0
        o.zero_grad()
        m(6).backward()
        if o is opt:
            o.convert_("adamw-8bit@cpu", workspace="2MiB")
        o.step()
        train(m, o, 7, 2)
        assert o is not opt or counts(opt)[1] > 0
        if o is opt:
            o.load_state_dict(o.state_dict())
    assert_same((model, opt), twin)
    copies = copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))
    train(*twin, 9, 3)
    for pair in copies:
        train(*pair, 9, 3)
        assert counts(pair[1])[1] > 0
        assert_same(pair, twin)


def test_a_full_device_goes_on_without_copies(device, monkeypatch):
    (model, opt), twin = early_twins()

    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for m, o in ((model, opt), twin):
        train(m, o, 0, 2)
        o.zero_grad()
        m(2).backward()
        if o is opt:
            opt.placement_stores.of("")._prefetch._wait()
            monkeypatch.setattr(prefetch, "fingerprint", full)
        o.step()
        train(m, o, 3, 2)
    assert_same((model, opt), twin)
    assert "not in backward(): the device has no memory left for looking at them" in opt.explain()


def test_optimizers_and_models_that_nobody_refers_to_are_gone(device):
    (model, opt), _ = early_twins()
    train(model, opt, 0, 3)
    gone = weakref.ref(opt.placement_stores.of("")), weakref.ref(opt), weakref.ref(model.layers[0].weight)
    del opt
    model(5).backward()
    gc.collect()
    assert gone[0]() is gone[1]() is None
    del model
    gc.collect()
    assert gone[2]() is None


@pytest.mark.parametrize("spec", ["adamw@cpu", "adamw@cpu/zero1", "adamw@cpu/zero2"])
def test_gradients_come_down_in_the_step_unless_something_else_is_asked_for(spec):
    """No card has shown yet that copies in ``backward()`` gain."""
    opt = memopt.create(odd_model(), spec)
    assert not opt.placement_stores.takes_params
    assert opt.placement_stores.of("")._prefetch is None
