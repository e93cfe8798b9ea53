"""What every rule can be told besides: cautious updates, Nesterov momentum for the Adam family, decay that goes with
the rate (AdamC's). None costs state, and what no kernel knows is said."""

import pytest
import torch

import memopt
from memopt.checkpoint import export, source_of
from memopt.core.hyperparameters import SpecError
from memopt.rules import RULES
from tests.helpers import ranks
from tests.helpers.sharded import drive, uneven_model

ADAMS = ("adam", "adamw", "radam", "adabound", "lamb", "ademamix", "adammini", "stableadamw")
SHAPE = (24, 80)


def gradients(count, shape=SHAPE):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def stepped(spec, steps=6, first=None, **hyper):
    p = torch.nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(99)))
    opt = memopt.create([("w", p)], spec, **hyper)
    for step, g in enumerate(gradients(steps)):
        if first is not None and step == first[0]:
            opt.param_groups[0].update(first[1])
        p.grad = g.clone()
        opt.step()
    return p.detach(), opt


def by_hand(cautious=False, nesterov=False, lr=1e-2, b1=0.9, b2=0.999, eps=1e-8, decay=0.1, steps=6):
    """AdamW in fp64; cautious as timm has it, Nesterov as optax has it."""
    p = torch.randn(SHAPE, generator=torch.Generator().manual_seed(99)).double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(map(torch.Tensor.double, gradients(steps)), 1):
        p *= 1 - lr * decay
        m.lerp_(g, 1 - b1)
        v.lerp_(g * g, 1 - b2)
        mean = m / (1 - b1**t)
        if nesterov:
            mean = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        if cautious:
            mask = (mean * g > 0).double()
            mean = mean * mask / mask.mean().clamp(min=1e-3)
        p -= lr * mean / ((v / (1 - b2**t)).sqrt() + eps)
    return p.float()


@pytest.mark.parametrize(
    "told", [{"cautious": True}, {"nesterov": True}, {"cautious": True, "nesterov": True}], ids=str
)
def test_they_are_what_is_written(told):
    found, opt = stepped("adamw", lr=1e-2, weight_decay=0.1, **told)
    torch.testing.assert_close(found, by_hand(**told), rtol=0, atol=2e-6)
    assert f"there is no kernel for adamw with {', '.join(told)}" in opt.explain()
    assert opt.ledger() == stepped("adamw")[1].ledger()


#: All but prodigy, which follows its own steps and refuses it (tests/rules/test_prodigy.py).
STEPPED = [name for name in RULES if not RULES[name].reports and not RULES[name].part_of]


@pytest.mark.parametrize("rule", [*STEPPED, "lookahead(adamw)", "adamw-8bit", "adamw-factored", "muon-8bit"])
def test_every_rule_can_be_cautious(rule):
    hyper = {"momentum": 0.9} if rule == "sgd" else {}
    plain, _ = stepped(rule, weight_decay=0.0, **hyper)
    careful, opt = stepped(rule, 1, weight_decay=0.0, cautious=True, **hyper)
    before = torch.randn(SHAPE, generator=torch.Generator().manual_seed(99))
    assert not ((careful - before) * gradients(1)[0] > 0).any()
    careful, opt = stepped(rule, weight_decay=0.0, cautious=True, **hyper)
    assert torch.isfinite(careful).all()
    assert not torch.equal(plain, careful)
    assert "cautious" in opt.explain()


@pytest.mark.parametrize("rule", ADAMS)
def test_nesterov_is_for_the_adam_family(rule):
    plain, ahead = stepped(rule)[0], stepped(rule, nesterov=True)[0]
    assert 1e-6 < float((plain - ahead).abs().max()) < 0.5
    assert "nesterov" in RULES[rule].in_torch


@pytest.mark.parametrize("told", ["cautious", "nesterov"])
def test_a_group_may_be_told_later(told):
    """From the third step on, with kernels and their plan before it and after it."""
    on = stepped("adamw", first=(3, {told: True}))[0]
    halves = stepped("adamw", 3)
    p = torch.nn.Parameter(halves[0].clone())
    opt = memopt.create([("w", p)], "adamw", **{told: True})
    opt.load_state_dict({**halves[1].state_dict(), "param_groups": opt.state_dict()["param_groups"]})
    for g in gradients(6)[3:]:
        p.grad = g
        opt.step()
    torch.testing.assert_close(on, p.detach(), rtol=0, atol=1e-7)
    off = stepped("adamw", first=(3, {told: False}), **{told: True})[0]
    assert not torch.equal(off, stepped("adamw")[0])


def test_decay_that_goes_with_the_rate_is_adamcs():
    """p loses lr² / peak * weight_decay of itself."""
    p = torch.nn.Parameter(torch.ones(8))
    opt = memopt.create([("w", p)], "adamw", lr=0.1, weight_decay=0.5)
    rates = memopt.schedule(opt, "linear", total_steps=10, decay_with_rate=True)
    expected = 1.0
    for _ in range(5):
        p.grad = torch.zeros(8)
        expected *= 1 - opt.param_groups[0]["lr"] ** 2 / 0.1 * 0.5
        opt.step()
        rates.step()
    torch.testing.assert_close(p.detach(), torch.full((8,), expected))


def test_what_does_not_know_them_refuses():
    with pytest.raises(ValueError, match="torch does not know cautious"):
        export(source_of(stepped("adamw", cautious=True)[1]), "torch")
    with pytest.raises(SpecError, match="cautious=True is not allowed; its kernels do not know it"):
        memopt.parse("adamw", engine="bitsandbytes", hyper={"cautious": True}).resolve()
    with pytest.raises(SpecError, match="lion has no hyperparameter 'nesterov'"):
        memopt.parse("lion", hyper={"nesterov": True}).resolve()
    with pytest.raises(SpecError, match=r"cautious=1\.5 is not allowed; cautious must be True or False"):
        memopt.parse("lion", hyper={"cautious": 1.5}).resolve()
    with pytest.raises(SpecError, match="in the convention of transformers"):
        memopt.create([torch.nn.Parameter(torch.ones(2))], "adafactor", cautious=True, convention="transformers",
                      weight_decay=0.1)  # fmt: skip


def on_ranks():
    model = uneven_model()
    drive(model, memopt.create(model, "adamw-8bit/zero1", cautious=True, nesterov=True), 0, 2)
    return [p.detach() for p in model.parameters()]


def test_ranks_step_as_one_process():
    alone = on_ranks()
    for rank in ranks.run(on_ranks, 2):
        for mine, p in zip(rank, alone, strict=True):
            torch.testing.assert_close(mine, p, rtol=0, atol=1e-6)
