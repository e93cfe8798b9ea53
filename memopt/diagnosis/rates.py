"""Smith's range test: train for some steps while the rate rises by a constant factor, and look at the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from memopt.core.hyperparameters import SpecError

#: Weight of the past in the smoothed loss.
SMOOTHING = 0.9
#: The test ends when the smoothed loss is this many times its lowest.
DIVERGED = 2.0


@dataclass(frozen=True)
class RangeTest:
    """Rates and losses, step by step; ``smoothed`` is a bias-corrected running mean of the losses."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss was lowest."""
        return self.rates[self.smoothed.index(min(self.smoothed))]

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss fell fastest."""
        until = self.smoothed.index(min(self.smoothed)) + 1
        falls = [a - b for a, b in pairwise(self.smoothed[:until])]
        return self.rates[falls.index(max(falls))] if falls else self.rates[0]

    @property
    def diverged(self) -> bool:
        """Whether the test ended because the loss had risen or was not a number any more."""
        return not math.isfinite(self.losses[-1]) or self.smoothed[-1] > DIVERGED * min(self.smoothed)

    @property
    def suggestion(self) -> float:
        """A peak rate to begin with: the geometric mean of where the loss fell fastest and a third of where it was
        lowest. Both err, the first low and the second high."""
        return math.sqrt(self.steepest * self.lowest / 3)


def range_test(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
) -> RangeTest:
    """Step ``optimizer`` on ``loss_of(step)`` with rates from ``lowest`` to ``highest``, each the same multiple of the
    one before.

    Groups keep the ratio of their rates; the rates of the test are those of the first group. It ends early when the
    loss is twice its lowest or not finite. Parameters, state and rates are afterwards as they were before (a copy of
    them is kept meanwhile). Source: Smith, "Cyclical learning rates for training neural networks", WACV 2017.
    """
    _check(lowest, highest, steps)
    rates, losses, smoothed = [], [], []
    mean = 0.0
    restore = _snapshot(optimizer)
    first = float(optimizer.param_groups[0]["lr"])
    shares = [float(group["lr"]) / first if first else 1.0 for group in optimizer.param_groups]
    try:
        for step in range(steps):
            rate = lowest * (highest / lowest) ** (step / (steps - 1))
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            optimizer.zero_grad()
            loss = loss_of(step)
            value = float(loss.detach())
            rates.append(rate)
            losses.append(value)
            if not math.isfinite(value):
                smoothed.append(math.inf)
                break
            mean = SMOOTHING * mean + (1 - SMOOTHING) * value
            smoothed.append(mean / (1 - SMOOTHING ** (step + 1)))
            if smoothed[-1] > DIVERGED * min(smoothed):
                break
            loss.backward()
            optimizer.step()
    finally:
        restore()
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed))


def _snapshot(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that puts parameters, state and groups back as they are now."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    values = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def restore() -> None:
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
        optimizer.load_state_dict(state)
        optimizer.zero_grad()

    return restore


def _check(lowest: float, highest: float, steps: int) -> None:
    if not 0 < lowest < highest < math.inf:
        raise SpecError(
            f"lowest={lowest!r}, highest={highest!r} is not allowed; rates rise from above 0: lowest < highest"
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 10:
        raise SpecError(f"steps={steps!r} is not allowed; it must be an integer >= 10")
