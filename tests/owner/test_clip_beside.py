"""Clipping inside the step beside what else looks at gradients: a GradScaler, another clipping, the check for NaN."""

import math

import pytest
import torch

import memopt
from memopt import kernels
from memopt.placements.gradients import checks
from tests.helpers.cases import assert_same_bits
from tests.helpers.clipped import BOUND, give, make


def test_a_grad_scaler_is_undone_by_the_same_factor() -> None:
    torch.manual_seed(0)
    models = [torch.nn.Linear(16, 16) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opt = memopt.create(models[0], "adamw-8bit", max_grad_norm=BOUND)
    other = memopt.create(models[1], "adamw-8bit")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(4, 16)
        opt.zero_grad(), other.zero_grad()
        scaler.scale(models[0](x).square().sum()).backward()
        models[1](x).square().sum().backward()
        norm = memopt.clip_grad_norm_(models[1], BOUND)
        scaler.step(opt)
        scaler.update()
        other.step()
        assert_same_bits(opt.grad_norm, norm)
        assert float(norm) > BOUND
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())


# What clipping tells the step ------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch):
    """How often gradients are looked at, with a plan and without."""
    count = []
    module = kernels.cached_step
    original = module.look
    monkeypatch.setattr(module, "look", lambda *given: count.append(1) or original(*given))
    return count


@pytest.mark.filterwarnings("ignore:NaN or Inf")
@pytest.mark.parametrize("change", [None, "write", "another", "norm", "less"])
def test_a_step_does_not_look_at_what_clipping_has_seen(change, looks) -> None:
    params, opt = make("adamw-8bit")
    for step in range(4):
        give(params, step)
        memopt.clip_grad_norm_(params[:2] if change == "less" else params, BOUND)
        if change == "write":
            params[1].grad[0, 0, 0] = math.nan
        if change == "another":
            params[1].grad = params[1].grad + math.nan
        if change == "norm":
            memopt.clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0)
        if step == 2:
            opt.stepper.plan = None
        looks.clear()
        opt.step()
        assert len(looks) == (change is not None)
    assert opt.skipped_steps == (4 if change in ("write", "another") else 0)


def test_gradients_that_somebody_else_clips_are_looked_at(looks) -> None:
    params, opt = make("adamw")
    for step in range(3):
        give(params, step)
        norm = torch.nn.utils.clip_grad_norm_(params, BOUND)
        looks.clear()
        opt.step()
        assert looks
        assert float(norm) > BOUND
    assert not checks.seen_finite(p.grad for p in params)


# Ranks ---------------------------------------------------------------------------------------------------------------
