"""A warning points to the line of the user's that led to it, whatever is between."""

import warnings

import pytest
import torch

import memopt


def skipped(opt, p):
    p.grad = torch.full_like(p, float("nan"))
    opt.step()


def converted(opt, p):
    theirs = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    theirs.step()
    opt.load_state_dict(theirs.state_dict())


def unnamed(opt, p):
    memopt.create([p], "muon")


@pytest.mark.parametrize("cause", [skipped, converted, unnamed])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_line_is_the_users(cause, steps):
    p = torch.nn.Parameter(torch.ones(64, 64))
    opt = memopt.create([p], "adamw-8bit")
    for _ in range(steps):  # then the step is from a plan
        p.grad = torch.ones_like(p)
        opt.step()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cause(opt, p)
    assert [one.filename for one in seen] == [__file__]
