"""What ``memopt.watch`` measures is so, on every rank, and it changes nothing."""

import pytest
import torch
from torch import nn

import memopt
from memopt.core.hyperparameters import SpecError
from tests.helpers import ranks
from tests.helpers.cases import odd_model, train


@pytest.mark.parametrize("spec", ["adamw", "adam", "lion", "radam", "rmsprop", "ademamix", "lookahead(adamw)"])
def test_the_shadow_of_32_bits_is_the_state_itself(spec):
    model = odd_model()
    opt = memopt.create(model, spec, lr=1e-2, weight_decay=0.1)
    with memopt.watch(opt, every=7, out=None) as watch:
        train(model, opt, 0, 14)
    moments = watch.readings[-1].moments
    assert {m.moment for m in moments} == {m.name for m in opt.rule.moments(opt.param_groups[0], (2, 2))}
    assert max(m.error for m in moments) < 1e-5


@pytest.mark.parametrize("spec", ["adafactor", "came", "lamb", "stableadamw", "adammini"])
def test_rules_that_look_at_whole_tensors_have_no_shadow(spec):
    model = odd_model()
    opt = memopt.create(model, spec)
    with memopt.watch(opt, every=2, out=None) as watch:
        train(model, opt, 0, 2)
    assert watch.readings[-1].moments == ()
    assert watch.readings[-1].groups[0].update_ratio > 0


def test_measurements_are_what_they_say():
    model = nn.Sequential(nn.Linear(10, 10, bias=False))
    nn.init.constant_(model[0].weight, 2.0)
    opt = memopt.create(model, "sgd", lr=0.5)
    with memopt.watch(opt, every=1, out=None) as watch:
        model[0].weight.grad = torch.full((10, 10), 0.2)
        watch.loss(3.0)
        opt.step()
        model[0].weight.grad = torch.full((10, 10), 1e-9)  # half of it is under half a step of fp32 at 1.9
        opt.step()
    first, second = (reading.groups[0] for reading in watch.readings)
    assert first.grad_norm == pytest.approx(2.0)
    assert first.update_ratio == pytest.approx(0.05)
    assert (first.lost, second.lost) == (0.0, 1.0)
    assert watch.readings[0].loss == 3.0
    assert watch.readings[1].loss is None


def test_it_changes_nothing():
    ends = []
    for watched in (False, True):
        model = odd_model(torch.bfloat16)
        opt = memopt.create(model, "adamw-8bit", lr=1e-3)
        watch = memopt.watch(opt, every=3, out=None) if watched else None
        train(model, opt, 0, 7)
        ends.append([p.detach().clone() for p in model.parameters()])
        assert watch is None or len(watch.readings) == 4
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def sharded_readings():
    """In each rank: the moments of the last reading under ZeRO-1, on random gradients that all ranks have."""
    model = odd_model()
    opt = memopt.create(model, "adamw-8bit/zero1", lr=1e-3)
    with memopt.watch(opt, every=4, out=None) as watch:
        for step in range(8):
            g = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=g)
            opt.step()
    return watch.readings[-1]


def test_every_rank_watches_its_own_rows():
    first, second = ranks.run(sharded_readings, 2)
    assert first.groups[0].grad_norm == pytest.approx(second.groups[0].grad_norm)
    for reading in (first, second):
        errors = {(m.parameter, m.moment): m.error for m in reading.moments}
        assert 0.005 < errors["wide.weight", "exp_avg_sq"] < 0.1
        assert max(errors.values()) < 0.1


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    model = odd_model()
    opt = memopt.create(model, "adamw-8bit")
    with memopt.watch(opt, every=1, tensorboard=tmp_path, out=None):
        train(model, opt, 0, 2)
    assert any(f.name.startswith("events.") for f in tmp_path.iterdir())


def test_bad_input():
    opt = memopt.create(nn.Linear(2, 2), "adamw")
    with pytest.raises(SpecError, match="every=0"):
        memopt.watch(opt, every=0)
    with pytest.raises(SpecError, match="an optimizer is needed, got a Linear"):
        memopt.watch(nn.Linear(2, 2))


def test_a_moment_that_is_switched_on_while_some_have_no_gradient():
    """What is compared in that step begins at zero, as what is stored does."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    opt = memopt.create([{"params": list(part.parameters())} for part in model], "adamw-8bit", lr=1e-3)
    seen = memopt.watch(opt, every=1, out=None)
    for step in range(4):
        for group in opt.param_groups:
            group["amsgrad"] = step >= 2
        for i, p in enumerate(model.parameters()):
            p.grad = torch.ones_like(p) if step != 2 or i < 2 else None
        opt.step()
    assert {m.moment for m in seen.readings[-1].moments} == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


def test_a_gradient_of_the_old_shape_is_the_steps_to_refuse():
    p = torch.nn.Parameter(torch.ones(9, 64))
    opt = memopt.create([p], "adamw", lr=1e-3)
    memopt.watch(opt, every=1, out=None)
    p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()
    p.data = torch.ones(5, 64)
    with pytest.raises(RuntimeError, match="gradient"):
        opt.step()
