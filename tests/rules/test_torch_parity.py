"""The rules are torch.optim's, within 1e-6 relative over 100 steps; Adafactor in transformers' convention too."""

import copy

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

import memopt
from tests.helpers.parity import assert_close, gradients, parameters, run_both

TORCH = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "radam": torch.optim.RAdam,
    "adafactor": torch.optim.Adafactor,
}
#: What makes our rule torch's.
OURS = {"adafactor": {"convention": "torch"}}
#: torch's choices of how to compute; memopt has none.
EXECUTION = ("foreach", "fused", "capturable", "differentiable")


def torch_inputs():
    """torch's own table of optimizer inputs, for the rules that are here."""
    for rule, cls in TORCH.items():
        info = next(i for i in optim_db if i.optim_cls is cls)
        for given in info.optim_inputs_func(device="cpu"):
            if any(given.kwargs.get(k) for k in EXECUTION) or torch.is_tensor(given.kwargs.get("betas", (0,))[0]):
                continue
            kwargs = {k: v for k, v in given.kwargs.items() if k not in EXECUTION}
            if rule == "radam" and kwargs.get("decoupled_weight_decay") is False:
                continue
            yield pytest.param(rule, kwargs, id=f"{rule} {given.desc}")


@pytest.mark.parametrize(("rule", "kwargs"), list(torch_inputs()))
def test_same_as_torch_on_torchs_own_inputs(rule, kwargs):
    a, b = parameters(), parameters()
    spec_kwargs = copy.deepcopy(kwargs) | OURS.get(rule, {})
    ours = memopt.create(a, rule, **spec_kwargs)
    theirs = TORCH[rule](b, **kwargs, **({} if rule == "adafactor" else {"foreach": False}))
    run_both(ours, theirs, a, b)
    assert_close(a, b)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
@pytest.mark.parametrize("rule", TORCH)
def test_same_as_torch_for_small_and_large_gradients(rule, scale):
    a, b = parameters(), parameters()
    run_both(memopt.create(a, rule, lr=1e-3, **OURS.get(rule, {})), TORCH[rule](b, lr=1e-3), a, b, scale=scale)
    assert_close(a, b)


@pytest.mark.parametrize("rule", ["adamw", "adam", "radam"])
def test_double_precision_parameters_step_in_double(rule):
    a, b = parameters(torch.float64), parameters(torch.float64)
    run_both(memopt.create(a, rule), TORCH[rule](b), a, b)
    assert_close(a, b)
    assert all(p.dtype == torch.float64 for p in a)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"warmup_init": True},
        {"scale_parameter": False},
        {"lr": 1e-3, "relative_step": False},
        {"lr": 1e-3, "relative_step": False, "scale_parameter": False, "weight_decay": 0.1},
        {"weight_decay": 0.1},
        {"beta1": 0.9},
        {"eps": (1e-16, 1e-2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_adafactor_in_the_transformers_convention(kwargs, scale):
    transformers = pytest.importorskip("transformers")
    a, b = parameters(), parameters()
    ours = memopt.create(a, "adafactor", convention="transformers", **kwargs)
    theirs = transformers.Adafactor(b, **kwargs)
    run_both(ours, theirs, a, b, scale=scale)
    assert_close(a, b)


def test_a_rate_that_is_given_to_adafactor_is_taken_as_it_stands():
    """As transformers' Trainer sets its Adafactor up: the relative step and the scale off."""
    transformers = pytest.importorskip("transformers")
    a, b = parameters(), parameters()
    ours = memopt.create(a, "adafactor", lr=1e-4, weight_decay=0.1)
    theirs = transformers.Adafactor(b, lr=1e-4, weight_decay=0.1, scale_parameter=False, relative_step=False)
    run_both(ours, theirs, a, b)
    assert_close(a, b)


def test_the_two_adafactor_conventions_differ():
    a, b = parameters(), parameters()
    ours = memopt.create(a, "adafactor", weight_decay=0.1, convention="torch")
    run_both(ours, memopt.create(b, "adafactor", weight_decay=0.1, convention="transformers"), a, b, steps=3)
    with pytest.raises(AssertionError):
        assert_close(a, b)


def test_bf16_parameters_are_rounded_once_from_an_fp32_step():
    a, b = parameters(torch.bfloat16), parameters(torch.bfloat16)
    ours = memopt.create(a, "adamw", lr=1e-2)
    exact = [p.detach().float().requires_grad_() for p in b]
    theirs = torch.optim.AdamW(exact, lr=1e-2)
    gradients(a, 0)
    for p, q in zip(exact, a, strict=True):
        p.grad = q.grad.float()
    ours.step()
    theirs.step()
    for p, q in zip(a, exact, strict=True):
        assert torch.equal(p, q.to(torch.bfloat16))
