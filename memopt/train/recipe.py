"""The recipe around the optimizer, as a user would write it: rate, warm-up and decay, clipping."""

from __future__ import annotations

from functools import partial
from math import cos, pi
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

#: The peak rate of each rule for this model and recipe, found by trying: the rate is not what is compared here.
LEARNING_RATE = {
    "adamw": 2e-3,
    "adam": 2e-3,
    "radam": 4e-3,
    "adafactor": 2e-3,
    "came": 3e-4,
    "lion": 6e-4,
    "rmsprop": 5e-4,
    "sgd": 0.3,
    "adabound": 2e-3,
    "lamb": 2e-2,
    "ademamix": 2e-3,
    "adammini": 2e-3,
    "stableadamw": 2e-3,
    "muon": 2e-3,
    # Not tried: half of what the paper has, and what the rule asks for.
    "sinkgd": 5e-4,
    "scale": 5e-4,
    "prodigy": 1.0,
    "apollo": 1e-2,
    "apollomini": 1e-2,
}


def learning_rate(rule: str) -> float:
    """The peak rate of a rule; of ``lookahead(adamw)`` that of ``adamw``."""
    return LEARNING_RATE[rule.rpartition("(")[2].rstrip(")")]


#: The share of all steps in which the rate rises to its peak, and the share of the peak at which it ends.
WARMUP, FLOOR = 0.1, 0.1
#: Gradients are scaled down to this norm.
CLIP_NORM = 1.0


def rate(step: int, steps: int) -> float:
    """The share of the peak rate at a step counted from 0: a linear rise, then a cosine to the floor.

    >>> [round(rate(step, 20), 2) for step in (0, 1, 2, 11, 20)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    warmup = max(round(WARMUP * steps), 1)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + cos(pi * min(progress, 1.0)))


def warmup_and_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """:func:`rate` as a scheduler of torch's; call its ``step()`` after each of the optimizer's."""
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, partial(rate, steps=steps))
