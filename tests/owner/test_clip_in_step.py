"""Clipping inside the step: the bits of clip, then step; ``p.grad`` as it was; the norm for the log."""

import copy
import math

import pytest
import torch

import memopt
from memopt import SpecError, kernels
from tests.helpers.cases import PLAIN_SPECS, assert_same_bits
from tests.helpers.clipped import BOUND, give, make


def everything(params, opt):
    return [p.detach() for p in params] + [x for p in params for _, x in sorted(opt.state[p].items())]


def assert_clipped_inside(spec, steps=3, before=lambda opt: None, **made) -> None:
    """A step with ``max_grad_norm`` beside memopt.clip_grad_norm_ and a step; the bound is active at odd steps."""
    inside, mine = make(spec, max_grad_norm=BOUND, **made)
    outside, other = make(spec, **made)
    for step in range(steps):
        give(inside, step, 1.0 if step % 2 else 1e-3)
        give(outside, step, 1.0 if step % 2 else 1e-3)
        norm = memopt.clip_grad_norm_(outside, BOUND)
        kept = [p.grad.clone() for p in inside]
        before(mine), before(other)
        mine.step(), other.step()
        assert_same_bits(mine.grad_norm, norm)
        assert (norm > BOUND) == bool(step % 2)
        for p, g in zip(inside, kept, strict=True):
            assert_same_bits(p.grad, g)
    for a, b in zip(everything(inside, mine), everything(outside, other), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("spec", PLAIN_SPECS)
def test_bits_are_those_of_clip_then_step(spec) -> None:
    assert_clipped_inside(spec)


def forget(opt) -> None:
    opt.stepper.plan = None


def without_kernels(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(kernels.cached_step, "library", lambda: None)
    monkeypatch.setattr(kernels.streamed_step, "library", lambda: None)


@pytest.mark.parametrize("spec", ["adamw-8bit", "adafactor", "came", "lamb-4bit", "lookahead(sgd)", "adamw@disk"])
def test_so_they_are_without_a_plan_and_without_kernels(spec, monkeypatch) -> None:
    assert_clipped_inside(spec, before=forget)
    without_kernels(monkeypatch)
    assert_clipped_inside(spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_of_other_dtypes_too(dtype, monkeypatch) -> None:
    for spec in ("adamw", "adafactor", "adamw-8bit+kahan"):
        assert_clipped_inside(spec, dtype=dtype)
    without_kernels(monkeypatch)
    assert_clipped_inside("adamw", dtype=dtype)


@pytest.mark.parametrize("spec", ["adamw@cpu", "adamw-8bit@host"])
def test_on_state_that_is_offloaded(spec, device) -> None:
    assert_clipped_inside(spec)


def test_strided_gradients_and_ones_that_are_not_there() -> None:
    params, opt = make("adamw", shapes=[(40, 30), (8, 8)], max_grad_norm=BOUND)
    others, other = make("adamw", shapes=[(40, 30), (8, 8)])
    for step in range(4):
        for some in (params, others):
            give(some, step)
            some[0].grad = some[0].grad.t().contiguous().t()
            some[1].grad = some[1].grad if step % 2 else None
        memopt.clip_grad_norm_(others, BOUND)
        opt.step(), other.step()
    for a, b in zip(everything(params, opt), everything(others, other), strict=True):
        assert_same_bits(a, b)


# The norm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_that_of_the_numbers(dtype) -> None:
    torch.manual_seed(0)
    some = [(torch.randn(n) * 10**e).to(dtype) for n, e in [(300_001, -1), (5, 2), (0, 0), (17, 1), (131_072, 0)]]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in some]
    for p, g in zip(params, some, strict=True):
        p.grad = g
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in some))
    found = {}
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        opt = memopt.create(params, "sgd", lr=0.0, max_grad_norm=math.inf)
        opt.step()
        found[threads] = float(opt.grad_norm)
    assert set(found.values()) == {torch.tensor(exact, dtype=torch.float32).item()}


def test_numbers_whose_squares_fp32_cannot_hold_have_a_norm() -> None:
    for size in (1e30, 1e-30):
        p = torch.nn.Parameter(torch.zeros(100))
        p.grad = torch.full((100,), size)
        opt = memopt.create([p], "sgd", lr=1.0, max_grad_norm=size)
        opt.step()
        torch.testing.assert_close(opt.grad_norm, torch.tensor(10 * size))
        if size > 1:
            torch.testing.assert_close(p.detach(), torch.full((100,), -size / 10))
        assert opt.skipped_steps == 0


@pytest.mark.filterwarnings("ignore:NaN or Inf")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_nan_and_inf_are_as_documented(bad, nonfinite) -> None:
    params, opt = make("adamw-8bit", max_grad_norm=BOUND, nonfinite=nonfinite)
    for step in range(3):
        give(params, step)
        if step == 2:
            params[1].grad[0, 0, 7] = bad
        before = [x.clone() for x in everything(params, opt)] if step == 2 else []
        if step == 2 and nonfinite == "raise":
            with pytest.raises(FloatingPointError, match="gradient of 1"):
                opt.step()
        else:
            opt.step()
    assert not opt.grad_norm.isfinite()
    changed = any(not torch.equal(a, b) for a, b in zip(before, everything(params, opt), strict=True))
    assert changed == (nonfinite == "propagate")
    assert opt.skipped_steps == (nonfinite == "skip")
    assert params[0].isfinite().all()


# Groups, schedules, saving -----------------------------------------------------------------------------------------


def test_groups_have_bounds_of_their_own_of_one_norm() -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    opt = memopt.create(
        [{"params": [a]}, {"params": [b], "max_grad_norm": 2.5}, {"params": [c], "max_grad_norm": None}],
        "sgd",
        lr=1.0,
        max_grad_norm=1.0,
    )
    for _ in range(2):
        for p, g in ((a, 3.0), (b, 4.0), (c, 0.0)):
            p.grad = torch.tensor([g])
            p.data.zero_()
        opt.step()
        assert float(opt.grad_norm) == 5.0
        torch.testing.assert_close(torch.cat([a, b, c]).detach(), torch.tensor([-0.6, -2.0, 0.0]))
    assert opt.max_grad_norm == (1.0, 2.5, None)
    c.grad = torch.tensor([12.0])
    opt.step()
    torch.testing.assert_close((opt.grad_norm, c.detach()), (torch.tensor(13.0), torch.tensor([-12.0])))
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    assert opt.param_groups[3]["max_grad_norm"] == 1.0
    opt.max_grad_norm = None
    opt.step()
    assert opt.grad_norm is None


def test_a_schedule_of_it_is_followed_without_another_plan() -> None:
    params, opt = make("adamw", max_grad_norm=1.0)
    others, other = make("adamw")
    for step in range(5):
        give(params, step)
        give(others, step)
        opt.param_groups[0]["max_grad_norm"] = 1.0 / (step + 1)
        memopt.clip_grad_norm_(others, 1.0 / (step + 1))
        plan = opt.stepper.plan
        opt.step(), other.step()
        assert step == 0 or opt.stepper.plan is plan
    for a, b in zip(everything(params, opt), everything(others, other), strict=True):
        assert_same_bits(a, b)


def test_the_bound_goes_where_the_groups_go(tmp_path) -> None:
    params, opt = make("adamw-8bit", max_grad_norm=0.5)
    give(params, 0)
    opt.step()
    assert copy.deepcopy(opt).max_grad_norm == 0.5
    _, other = make("adamw-8bit")
    other.load_state_dict(opt.state_dict())
    assert other.max_grad_norm == 0.5
    opt.convert_("lion-4bit")
    assert opt.max_grad_norm == 0.5
    model = torch.nn.Linear(8, 8)
    opt = memopt.create(model, "adamw", max_grad_norm=0.5)
    model(torch.ones(1, 8)).sum().backward()
    opt.step()
    memopt.save(tmp_path / "saved", model=model, optimizer=opt)
    other = memopt.create(model, "adafactor")
    memopt.load(tmp_path / "saved", model=model, optimizer=other)
    assert other.max_grad_norm == 0.5
    assert "to a norm of 0.5" in other.explain()


def test_what_cannot_be_is_refused_with_a_sentence() -> None:
    model = torch.nn.Linear(8, 8)
    for bad in (0, -1.0, math.nan, True, "1.0"):
        with pytest.raises(SpecError, match=r"max_grad_norm=.* is not allowed; it must be a number > 0"):
            memopt.create(model, "adamw", max_grad_norm=bad)
        opt = memopt.create(model, "adamw")
        with pytest.raises(SpecError, match="max_grad_norm"):
            opt.max_grad_norm = bad
        opt.param_groups[0]["max_grad_norm"] = bad
        with pytest.raises(SpecError, match="max_grad_norm"):
            opt.step()
        with pytest.raises(SpecError, match="max_grad_norm"):
            memopt.create([{"params": model.parameters(), "max_grad_norm": bad}], "adamw")
    with pytest.raises(SpecError, match="did you mean 'max_grad_norm'"):
        memopt.create([{"params": model.parameters(), "max_gradnorm": 1.0}], "adamw")
    opt = memopt.create(model, "adamw", max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"release_gradients\(model, max_norm"):
        opt.release_gradients(model)
    opt = memopt.create(model, "adamw")
    opt.release_gradients(model)
    opt.max_grad_norm = 1.0
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="max_grad_norm needs the norm"):
        opt.step()
