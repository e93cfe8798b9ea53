"""Optimizers as they are after some hundred steps."""

from __future__ import annotations

import torch

import memopt
from memopt.kernels.huge_pages import STEADY


def settle(opt: torch.optim.Optimizer) -> None:
    """Steps until nothing is made or moved any more: the large pages at once, which are otherwise spread over steps."""
    for _ in range(2 * STEADY):
        opt.step()
    if isinstance(opt, memopt.Optimizer) and opt.stepper.plan is not None and opt.stepper.plan.pages is not None:
        opt.stepper.plan.pages.after(float("inf"))
