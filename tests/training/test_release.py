"""Gradient release: the parameters of the plain step, without the bytes of the gradients, or a reason why not."""

import copy
import warnings

import pytest
import torch
from torch import nn

import memopt
from estimators.measure import traced
from tests.helpers.cases import HYPER, assert_same_bits, odd_model, train

SPECS = [
    "adamw",
    "adamw-8bit",
    "adamw-4bit@paged",
    "adafactor",
    "came-8bit",
    "sgd",
    "lion-8bit",
    "adamw-8bit/zero1",
    "lookahead(adamw)-8bit",
]


def pair(spec, dtype=torch.float32, **hyper):
    """The same model and optimizer twice."""
    hyper = {**HYPER.get(memopt.parse(spec).rule, {}), **hyper}
    models = odd_model(dtype), odd_model(dtype)
    return [(model, memopt.create(model, spec, **hyper)) for model in models]


def same(a, b):
    for (name, p), q in zip(a[0].named_parameters(), b[0].parameters(), strict=True):
        assert_same_bits(p, q, name)
        assert a[1].state[p].keys() == b[1].state[q].keys()
        for key, value in a[1].state[p].items():
            assert_same_bits(value, b[1].state[q][key], f"{name}.{key}")


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_and_state_are_those_of_the_plain_step(spec):
    plain, released = pair(spec)
    released[1].release_gradients(released[0])
    rates = [memopt.schedule(opt, "cosine", warmup=2, total_steps=5) for _, opt in (plain, released)]
    for step in range(4):
        for (model, opt), rate in zip((plain, released), rates, strict=True):
            train(model, opt, step, 1)
            rate.step()
        assert all(p.grad is None for p in released[0].parameters())
    same(plain, released)


@pytest.mark.parametrize("spec", ["adamw-8bit+split", "adamw+stochastic", "sgd+kahan"])
def test_masters_too(spec):
    plain, released = pair(spec, torch.bfloat16)
    released[1].release_gradients(released[0])
    for model, opt in (plain, released):
        train(model, opt, 0, 3)
    same(plain, released)


def test_a_parameter_unfrozen_later_is_released_too_and_after_remove_gradients_stay():
    plain, released = pair("adamw")
    for model, opt in (plain, released):
        model.wide.weight.requires_grad_(False)
        if opt is released[1]:
            release = opt.release_gradients(model)
        model.wide.weight.requires_grad_(True)
        train(model, opt, 0, 2)
    assert release.covers(released[0].wide.weight)
    same(plain, released)
    assert "released" in released[1].explain()
    release.remove()
    assert "released" not in released[1].explain()
    for model, opt in (plain, released):
        train(model, opt, 2, 2)
    assert released[0].vector.grad is not None
    same(plain, released)


class Stack(nn.Module):
    """Twelve layers whose gradients are far larger than their activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(12))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def peak(release, max_norm=None):
    """Peak of the second step, state being there, and what all gradients take."""
    torch.manual_seed(0)
    model = Stack()
    opt = memopt.create(model, "adamw-8bit")
    if release:
        opt.release_gradients(model, max_norm=max_norm)
    x = torch.randn(4, 512)

    def step():
        loss = model(x).square().mean()
        if max_norm:
            loss.backward(retain_graph=True)
        loss.backward()
        opt.step()
        opt.zero_grad()

    step()
    return traced(("step", step)).peak


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_the_peak_is_lower_by_the_gradients_but_one(max_norm):
    one = 4 * 512 * 512
    plain, released = peak(False), peak(True, max_norm)
    assert plain >= 12 * one
    assert released <= plain - 11 * one + 128 * 1024  # activations that are gone when the last gradient is made
    assert released < 1.5 * one


def test_accumulation_is_refused_in_the_second_backward_pass():
    model = odd_model()
    opt = memopt.create(model, "adamw")
    opt.release_gradients(model)
    model(0).backward()
    with pytest.raises(RuntimeError, match=r"came again before optimizer.step\(\)"):
        model(1).backward()
    opt.step()
    train(model, opt, 2, 1)


def test_a_norm_costs_a_second_pass_and_clips_as_the_plain_step():
    plain, released = pair("adamw")
    release = released[1].release_gradients(released[0], max_norm=0.05)
    for step in range(3):
        plain[1].zero_grad()
        plain[0](step).backward()
        norm = memopt.clip_grad_norm_(plain[0], 0.05)
        plain[1].step()
        loss = released[0](step)
        loss.backward(retain_graph=True)
        loss.backward()
        released[1].step()
        assert release.norm == pytest.approx(float(norm), rel=1e-6)
        assert release.norm > 0.05
    for p, q in zip(plain[0].parameters(), released[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_one_pass_where_a_norm_needs_two_changes_nothing_and_says_so():
    model = odd_model()
    opt = memopt.create(model, "adamw")
    opt.release_gradients(model, max_norm=1.0)
    before = copy.deepcopy(model.state_dict())
    model(0).backward()
    with pytest.raises(RuntimeError, match="needs two backward passes"):
        opt.step()
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])


def poisoned(model, x=0):
    """A loss whose gradient is NaN for ``vector`` alone."""
    return model(x) + (model.vector * float("nan")).sum()


def test_a_nan_skips_its_parameter_or_with_a_norm_the_step():
    for max_norm in (None, 1.0):
        model = odd_model()
        opt = memopt.create(model, "adamw")
        opt.release_gradients(model, max_norm=max_norm)
        before = copy.deepcopy(model.state_dict())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                loss = poisoned(model)
                if max_norm:
                    loss.backward(retain_graph=True)
                loss.backward()
                opt.step()
        assert len([w for w in seen if "NaN or Inf in the gradient of" in str(w.message)]) == 1
        assert opt.skipped_steps == 2
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert "vector" not in changed
        assert bool(changed) == (max_norm is None)
        assert all(p.grad is None for p in model.parameters())


def test_raise_names_the_parameter_and_training_can_go_on():
    model = odd_model()
    opt = memopt.create(model, "adamw", nonfinite="raise")
    opt.release_gradients(model)
    with pytest.raises(FloatingPointError, match="gradient of vector: it and what comes after it"):
        poisoned(model).backward()
    assert not opt.state[model.vector]
    train(model, opt, 1, 1)


def test_propagate_does_not_look():
    model = odd_model()
    opt = memopt.create(model, "sgd", nonfinite="propagate")
    opt.release_gradients(model)
    poisoned(model).backward()
    opt.step()
    assert model.vector.isnan().all()


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_what_needs_all_gradients_is_refused_with_the_reason():
    model = odd_model()
    opt = memopt.create(model, "adamw")
    opt.release_gradients(model)
    with pytest.raises(RuntimeError, match="before there is a norm of all of them"):
        memopt.clip_grad_norm_(opt, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with released gradients"):
        scaler.step(opt)
    with pytest.raises(RuntimeError, match="under DataParallel"):
        opt.release_gradients(nn.DataParallel(model))
    with pytest.raises(ValueError, match=r"vector of shape \(4097,\) is not a parameter of the model"):
        opt.release_gradients(odd_model())
    with pytest.raises(TypeError, match="takes the model, not a list"):
        opt.release_gradients(list(model.parameters()))
    with pytest.raises(memopt.SpecError, match="max_norm=-1 is not allowed"):
        opt.release_gradients(model, max_norm=-1)


def test_a_copy_has_no_hooks():
    model = odd_model()
    opt = memopt.create(model, "adamw")
    opt.release_gradients(model)
    train(model, opt, 0, 1)
    twin, other = copy.deepcopy((model, opt))
    assert other.release is None
    twin(1).backward()
    assert twin.vector.grad is not None
