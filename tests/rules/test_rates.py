"""How far an element moves, and rates that belong to another rule."""

import pytest
import torch

import memopt
from memopt.rules import RULES
from memopt.rules.adamw import longest


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
@pytest.mark.parametrize("spec", ["adamw-8bit.factored", "adam-4bit.factored", "adamw-factored", "radam-8bit.factored"])
def test_no_element_moves_further_than_its_own_second_moment_would_let_it(spec, betas):
    """One element of a quiet row and column: a second moment of rank one knows nothing of it."""
    p = torch.nn.Parameter(torch.zeros(256, 256))
    opt = memopt.create([p], spec, lr=1.0, betas=betas, weight_decay=0.0)
    moved = []
    for step in range(12):
        g = torch.Generator().manual_seed(step)
        p.grad = torch.randn(256, 256, generator=g) * 1e-4
        if step >= 10:
            p.grad[3, 5] = 1.0
        before = p.detach().clone()
        opt.step()
        moved.append(float((p.detach() - before).abs().max()))
    assert max(moved[:10]) > 0
    assert moved[10] == pytest.approx(min(moved[10], longest(*betas)))
    if spec.startswith("adam"):
        assert moved[10] == pytest.approx(longest(*betas), rel=1e-5)
    assert moved[11] <= longest(*betas) * (1 + 1e-5)


@pytest.mark.parametrize(
    ("rule", "lr", "words"),
    [
        ("adamw", 1e-4, None),
        ("lion", 1e-4, None),
        ("lion", 1e-3, "lr is 0.001; rates of lion are about 4 times smaller than those of adamw"),
        ("sgd", 1e-4, "lr is 0.0001; rates of sgd are about 150 times larger than those of adamw"),
        ("sgd", 0.1, None),
        ("lookahead(lamb)", 1e-3, "about 10 times larger"),
    ],
)
def test_a_rate_that_is_plainly_adamws_is_said(rule, lr, words):
    opt = memopt.create(torch.nn.Linear(4, 4), rule, lr=lr)
    lines = [line for line in opt.explain().splitlines() if line.startswith("rate ")]
    assert len(lines) == (words is not None)
    assert words is None or words in lines[0]


def test_the_rate_of_a_group_of_another_rule_is_said():
    opt = memopt.create(torch.nn.Linear(4, 4), "adamw", lr=1e-3, overrides={"bias": "lion"})
    lines = [line for line in opt.explain().splitlines() if line.startswith("rate ")]
    assert len(lines) == 1
    assert "lr is 0.001; rates of lion are about 4 times smaller than those of adamw" in lines[0]


def test_a_conversion_says_where_the_rate_stays_and_the_rule_wants_another():
    model = torch.nn.Linear(4, 4)
    opt = memopt.create(model, "adamw", lr=1e-4)
    assert "lr is 0.0001; rates of lion are about 4 times smaller than those of adamw" in str(opt.convert_("lion"))
    assert "rates of" not in str(opt.convert_("lion-8bit"))
    assert RULES["adamw"].about_rate(None) is None
