"""Prepared steps of the Triton kernels: NaN, a GradScaler's scale, counting on the device, what makes a plan void."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import memopt
from memopt import kernels
from memopt.kernels.triton import available as triton
from tests.helpers.cases import assert_same_bits, thinned
from tests.helpers.interpreting import DEVICE, MAX_TIES, gradients, parameters
from tests.kernels.test_kernels import assert_close

pytest.importorskip("triton", minversion="3.3")
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_with_nan_does_not_happen(capturable, on) -> None:
    on(True)
    params = parameters([(17, 300), (33,)])
    opt = memopt.create(params, "adamw-8bit", capturable=capturable)
    for step in range(2):
        gradients(params, step)
        opt.step()
    before = [p.detach().clone() for p in params], [{k: t.clone() for k, t in opt.state[p].items()} for p in params]
    gradients(params, 2)
    params[1].grad[5] = float("nan")
    opt.step()
    if capturable:
        assert opt.skipped_steps == 1
    else:
        with pytest.warns(UserWarning, match="gradient of 1: this step was skipped"):
            assert opt.skipped_steps == 1
    for p, q, old in zip(params, *before, strict=True):
        assert_same_bits(p.detach(), q)
        for key, value in opt.state[p].items():
            assert_same_bits(value, old[key], key)
    gradients(params, 3)
    opt.step()
    assert opt.skipped_steps == 1
    assert [float(opt.state[p]["step"]) for p in params] == [3, 3]
    opt.zero_grad()
    opt.step()  # with no gradient at all nothing is counted, and nothing forgotten
    assert opt.skipped_steps == 1
    assert opt.state_dict()["memopt"]["skipped_steps"] == 1


def test_raise_names_the_parameter_and_changes_nothing(on) -> None:
    on(True)
    params = parameters([(17, 300), (33,)])
    opt = memopt.create(params, "adamw", nonfinite="raise")
    for step in range(2):
        gradients(params, step)
        opt.step()
    before = params[0].detach().clone()
    params[0].grad[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="gradient of 0"):
        opt.step()
    assert_same_bits(params[0].detach(), before)
    assert float(opt.state[params[0]]["step"]) == 2


def test_rates_that_change_are_taken(on) -> None:
    on(True)
    params = parameters([(17, 300)])
    opt = memopt.create(params, "adamw-8bit")
    reference = parameters([(17, 300)])
    plain = memopt.create(reference, "adamw-8bit")
    for step in range(4):
        for each, chosen, yes in ((opt, params, True), (plain, reference, False)):
            on(yes)
            gradients(chosen, step)
            each.param_groups[0]["lr"] = 10.0 ** -(step + 1)
            each.param_groups[0]["weight_decay"] = 0.1 * step
            each.step()
    assert_close(params[0].detach(), reference[0].detach(), 0.0, MAX_TIES, "scheduled")


def test_rates_on_the_device_are_taken(on, monkeypatch) -> None:
    """Without a plan, in the first step, and with one; AdaBound's bounds follow the rate of the beginning too."""
    from memopt.kernels.triton import tables

    def stepped(yes: bool, rate: Callable[[float], float | torch.Tensor]) -> torch.Tensor:
        on(yes)
        [p] = parameters([(17, 300)])
        opt = memopt.create([p], "adabound", gamma=0.5)
        for step in range(3):
            gradients([p], step)
            opt.param_groups[0].update(lr=rate(0.01 * 0.3**step), initial_lr=rate(0.1))
            opt.step()
        return p.detach()

    monkeypatch.setattr(tables, "rates_on_device", lambda h: [k for k in tables.RATES if torch.is_tensor(h.get(k))])
    assert_close(stepped(True, lambda x: torch.tensor(x, device=DEVICE)), stepped(False, float), 0.0, 0, "adabound")


class Scaler:
    """What torch.amp.GradScaler does around a step of an optimizer that takes its scale."""

    def __init__(self, scale: float) -> None:
        self.scale = torch.tensor(scale, device=DEVICE)

    def step(self, opt: memopt.Optimizer, found: float = 0.0) -> None:
        assert opt._step_supports_amp_scaling
        opt.grad_scale = self.scale
        opt.found_inf = torch.tensor(found, device=DEVICE)
        opt.step()
        del opt.grad_scale, opt.found_inf


def test_the_scale_of_a_grad_scaler_is_taken_on_the_device(on) -> None:
    on(True)
    params, reference = parameters([(17, 300)]), parameters([(17, 300)])
    opt, plain = memopt.create(params, "adamw-8bit"), memopt.create(reference, "adamw-8bit")
    for step in range(3):
        gradients(params, step)
        gradients(reference, step)
        if step:
            params[0].grad *= 1024
            Scaler(1024.0).step(opt)
        else:
            opt.step()
        plain.step()
    assert_same_bits(params[0].detach(), reference[0].detach())
    before = params[0].detach().clone()
    gradients(params, 3)
    Scaler(1024.0).step(opt, found=1.0)
    assert opt.skipped_steps == 1
    assert_same_bits(params[0].detach(), before)
    assert float(opt.state[params[0]]["step"]) == 3


def test_a_scale_is_heeded_where_there_is_no_plan_for_it(on) -> None:
    on(True)
    params, reference = parameters([(33,)]), parameters([(33,)])
    opt, plain = memopt.create(params, "adamw"), memopt.create(reference, "adamw")
    for each, chosen in ((opt, params), (plain, reference)):
        gradients(chosen, 0)
        each.step()
    gradients(params, 1)
    gradients(reference, 1)
    params[0].data = params[0].data.clone()  # the plan was for other memory
    params[0].grad *= 8
    Scaler(8.0).step(opt)
    plain.step()
    assert_same_bits(params[0].detach(), reference[0].detach())
    params[0].data = params[0].data.clone()
    Scaler(8.0).step(opt, found=1.0)
    assert opt.skipped_steps == 1


def test_a_plan_notices_what_changes(on) -> None:
    on(True)
    a, b = parameters([(20, 256), (20, 256)])
    opt = memopt.create([a, b], "adamw-8bit", lr=0.1)

    def step(*params: torch.nn.Parameter) -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        opt.zero_grad()

    step(a, b)
    first = opt.stepper.plan
    step(a, b)
    assert opt.stepper.plan is first
    frozen = b.detach().clone()
    step(a)
    assert torch.equal(b, frozen)
    assert opt.stepper.plan is first
    step(a, b)
    assert (float(opt.state[a]["step"]), float(opt.state[b]["step"])) == (4, 3)
    a.data = torch.zeros_like(a)
    step(a, b)
    assert (a != 0).all()
    opt.load_state_dict(opt.state_dict())
    step(a, b)
    assert float(opt.state[a]["step"]) == 6
    kept = a.detach().clone()
    opt.param_groups[0].update(lr=0.0)
    step(a, b)
    assert torch.equal(a, kept)


@pytest.mark.parametrize(
    "spec", thinned(["adamw-8bit", "adafactor", "lamb-factored", "stableadamw", "came", "adammini"], 3)
)
def test_a_plan_steps_those_that_have_gradients(spec, on) -> None:
    def run(cached: bool) -> list[torch.Tensor]:
        params = parameters([(17, 300), (9, 64), (33,), (0, 3)])
        opt = memopt.create(params, spec)
        for step in range(4):
            on(True)
            gradients(params, step)
            if step:
                params[step - 1].grad = None
            if not cached:
                opt.stepper.plan = None
            first = opt.stepper.plan
            opt.step()
            assert not step or not cached or opt.stepper.plan is first
        return [p.detach() for p in params] + [x for p in params for _, x in sorted(opt.state[p].items())]

    for a, b in zip(run(True), run(False), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("spec", ["adamw-8bit", "adafactor", "stableadamw"])
def test_clipping_is_done_on_the_device_and_has_the_bits_of_clip_then_step(spec, on) -> None:
    on(True)
    shapes = [(17, 300), (33,), (0, 3)]
    inside, outside = parameters(shapes), parameters(shapes)
    opt, other = memopt.create(inside, spec, max_grad_norm=5.0), memopt.create(outside, spec)
    for step in range(4):
        for params in (inside, outside):
            gradients(params, step)
            for p in params:
                p.grad.mul_(1e-3 if step == 2 else 10.0)
        kept = [p.grad.clone() for p in inside]
        norm = memopt.clip_grad_norm_(outside, 5.0)
        opt.step()
        other.step()
        assert_same_bits(opt.grad_norm, norm)
        assert (float(norm) > 5) == (step != 2)
        for p, g in zip(inside, kept, strict=True):
            assert_same_bits(p.grad, g)
    for p, q in zip(inside, outside, strict=True):
        assert_same_bits(p.detach(), q.detach())
        for key, x in opt.state[p].items():
            assert_same_bits(x, other.state[q][key], key)
    inside[0].grad[0, 0] = float("inf")
    opt.step()
    assert not opt.grad_norm.isfinite()
    with pytest.warns(UserWarning, match="gradient of 0: this step was skipped"):
        assert opt.skipped_steps == 1


def test_a_triton_that_does_not_start_is_not_used_and_says_why(monkeypatch) -> None:
    from triton.runtime import driver

    def fails() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(triton, "_not_starting", triton._not_starting.__wrapped__)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(type(driver), "active", property(lambda self: fails()))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton.missing("cuda").startswith("Triton does not start here: Failed to find C compiler. (it needs")
    assert triton.status("cuda").startswith("the plain torch path: Triton does not start here")


def test_a_triton_that_is_too_old_is_not_used_and_says_so(monkeypatch) -> None:
    monkeypatch.setattr(triton, "version", lambda: "3.2.0+git35c6c7c6")
    reason = "the kernels need Triton 3.3 (that of torch 2.7), and 3.2.0+git35c6c7c6 is installed"
    assert triton.missing("cuda") == reason
    assert triton.status("cuda") == f"the plain torch path: {reason}"
    monkeypatch.setattr(triton, "version", lambda: "3.10.1")
    assert triton.missing("cuda") is None


def test_explain_and_slow_path(on) -> None:
    on(False)
    params = parameters([(33,)])
    opt = memopt.create(params, "adamw")
    if DEVICE == "cuda":
        assert "there are no kernels for cuda" in opt.explain()
    assert triton.missing("mps") == "there are no kernels for mps"
    assert "plain torch path" in triton.status("mps")
    on(True)
    assert "Triton" in triton.status(DEVICE)
    assert "stepped by" not in memopt.create(params, "adamw").explain()
    assert kernels.make_cached_step(None, [], {}, bool, None) is None
