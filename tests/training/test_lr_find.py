"""Smith's range test: it finds the edge of a problem whose edge is known, and leaves everything as it was."""

import json

import pytest
import torch
from torch import nn

import memopt
from memopt.cli import main
from memopt.core.hyperparameters import SpecError
from memopt.diagnosis import range_test


def quadratic(curvature=4.0):
    """Gradient descent on curvature / 2 * w² converges below a rate of 2 / curvature and diverges above; the noise
    keeps it from converging to a zero from which it could not diverge."""
    w = nn.Parameter(torch.ones(8))
    noise = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) / 10
    return w, lambda step: curvature / 2 * (w - noise[step]).square().sum()


def test_gradient_descent_diverges_where_theory_says():
    w, loss_of = quadratic()
    result = range_test(memopt.create([w], "sgd", lr=1.0), loss_of, lowest=1e-3, highest=1e2, steps=200)
    assert result.diverged
    assert 0.3 < result.rates[-1] < 1.0  # at 2 / 4; the noise is amplified without bound on the way there
    assert result.steepest < result.lowest < result.rates[-1]
    assert result.steepest < result.suggestion < 0.5
    ratios = [b / a for a, b in zip(result.rates, result.rates[1:], strict=False)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


@pytest.mark.parametrize("steps_before", [0, 3])
def test_afterwards_everything_is_as_before(steps_before):
    torch.manual_seed(0)
    model, twin = nn.Linear(80, 64), nn.Linear(80, 64)
    twin.load_state_dict(model.state_dict())
    pair = []
    for m in (model, twin):
        opt = memopt.create(memopt.param_groups(m, 0.1, rates={"bias": 1e-2}), "adamw-8bit", lr=1e-3)
        for step in range(steps_before):
            opt.zero_grad()
            m(torch.full((2, 80), step + 1.0)).square().mean().backward()
            opt.step()
        pair.append(opt)
    seen = []

    def loss_of(step):
        seen.append([g["lr"] for g in pair[0].param_groups])
        return model(torch.ones(2, 80)).square().mean()

    range_test(pair[0], loss_of, lowest=1e-4, highest=1e-1, steps=20)
    assert [b / a for a, b in seen] == pytest.approx([10.0] * len(seen)), "groups keep the ratio of their rates"
    assert [g["lr"] for g in pair[0].param_groups] == [1e-3, 1e-2]
    for m, opt in zip((model, twin), pair, strict=True):
        opt.zero_grad()
        m(torch.ones(2, 80)).square().mean().backward()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_loss_that_is_not_a_number_ends_it():
    w, loss_of = quadratic()
    result = range_test(memopt.create([w], "sgd", lr=1.0), lambda s: loss_of(s) * (float("nan") if s == 30 else 1.0))
    assert len(result.rates) == 31
    assert result.diverged
    assert torch.equal(w, torch.ones(8))


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    argv = ["lr-find", str(text), "--steps", "40", "--batch", "2", "--context", "16", "--from", "1e-4", "--to", "10"]
    assert main([*argv, "--plot", str(tmp_path / "rates.png")]) == 0
    out = capsys.readouterr().out
    assert "A peak rate to begin with: " in out
    assert "It diverged at" in out
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert len(written["rates"]) == len(written["losses"]) <= 40
    assert 1e-4 < written["suggestion"] < 10


@pytest.mark.parametrize(
    ("keywords", "words"),
    [({"lowest": 0.0}, "lowest=0.0"), ({"lowest": 1.0, "highest": 0.1}, "highest=0.1"), ({"steps": 3}, "steps=3")],
)
def test_bad_input(keywords, words):
    w, loss_of = quadratic()
    with pytest.raises(SpecError, match=words):
        range_test(memopt.create([w], "sgd"), loss_of, **keywords)


def test_the_command_refuses(capsys):
    assert main(["lr-find", "--optim", "adamv"]) == 2
    assert "unknown rule 'adamv'" in capsys.readouterr().err
    assert main(["lr-find", "--steps", "3"]) == 2
    assert "steps=3" in capsys.readouterr().err
