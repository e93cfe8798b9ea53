"""Every rule into every other."""

import pytest
import torch

import memopt
from memopt.core.hyperparameters import SpecError
from memopt.rules import RULES
from tests.helpers.cases import HYPER

ALL_RULES = [
    *(name for name, rule in RULES.items() if rule.declines is None),
    "lookahead(adamw)",
    "lookahead(adafactor)",
]
#: The first moments of rules that keep means of something else than gradients.
OTHER = {("came", "exp_avg"), ("adafactor", "exp_avg"), ("rmsprop", "momentum_buffer"), ("sgd", "momentum_buffer")}
OTHER |= {("prodigy", "exp_avg"), ("prodigy", "exp_avg_sq")}


def after_constant_gradients(rule, steps=4):
    weights = torch.nn.ParameterList([torch.ones(6, 8), torch.ones(5)])
    hyper = {"lr": 0.0, "weight_decay": 0.0, **HYPER.get(rule, {}), **({"beta1": 0.9} if "adafactor" in rule else {})}
    hyper |= {"momentum": 0.9} if rule == "rmsprop" else {}
    opt = memopt.create(weights, rule, **hyper)
    for _ in range(steps):
        for p in weights:
            p.grad = torch.full_like(p, 0.5)
        opt.step()
    return weights, opt, hyper


@pytest.mark.parametrize("before", ALL_RULES)
def test_every_rule_becomes_every_other_as_if_it_had_seen_the_same_gradients(before):
    """A moment that is carried is what the other rule would have of the same constant gradients; one that is not must
    be filled, and the refusal says how."""
    for after in ALL_RULES:
        weights, opt, _ = after_constant_gradients(before)
        others, there, hyper = after_constant_gradients(after)
        names = {key.partition(".")[0] for key in there.state[others[0]]} - {"step", "slow"}
        kept = {key.partition(".")[0] for key in opt.state[weights[0]]}
        plain = before.removeprefix("lookahead(").rstrip(")"), after.removeprefix("lookahead(").rstrip(")")
        lacking = {
            m
            for m in names
            if m not in kept or (plain[0] != plain[1] and ((plain[0], m) in OTHER or (plain[1], m) in OTHER))
        }
        filled = {}
        for _ in lacking:
            with pytest.raises(SpecError, match=r"say how to fill it, for example fill=") as refusal:
                opt.convert_(after, fill=filled, **hyper)
            missing = str(refusal.value).partition("needs '")[2].partition("'")[0]
            assert missing in lacking - set(filled), after
            filled[missing] = 0
        opt.convert_(after, fill=filled, **hyper)
        for p, q in zip(weights, others, strict=True):
            assert opt.state[p].keys() == there.state[q].keys(), after
            for key, value in there.state[q].items():
                if key.partition(".")[0] not in lacking | {"slow"}:  # those are weights
                    torch.testing.assert_close(opt.state[p][key], value, rtol=1e-5, atol=0, msg=f"{after}: {key}")
