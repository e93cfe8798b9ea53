"""What a moment of a rule is the mean of, and how much of that mean has arrived after t steps.

Rules share names of moments and not always their meaning: ``exp_avg`` is a mean of gradients in Adam and Lion, of
normalised updates in CAME, of whole steps in Adafactor; RMSprop's momentum is of normalised gradients, SGD's of
gradients as they are. Only moments of one meaning are carried from rule to rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from memopt.rules import RULES

_OTHER_MEANING = {
    ("came", "exp_avg"): "a mean of normalised updates",
    ("adafactor", "exp_avg"): "a mean of steps",
    ("sgd", "momentum_buffer"): "a sum of gradients",
    ("muon", "momentum_buffer"): "a mean of gradients",
    ("rmsprop", "momentum_buffer"): "a sum of normalised gradients",
}
_MEANING = {"exp_avg": "a mean of gradients", "exp_avg_sq": "a mean of squared gradients"}


@cache
def meaning(rule: str, moment: str) -> str:
    """What ``moment`` is a mean of, in words; its own name where only one rule keeps it."""
    rule = rule.rpartition("(")[2].rstrip(")")  # of lookahead(adafactor), adafactor
    on = {**RULES[rule].hyperparameters, **dict.fromkeys(RULES[rule].moments_by, 0.5)}
    said = next((m.mean_of for m in RULES[rule].moments(on, (2, 2)) if m.name == moment), "")
    return said or _OTHER_MEANING.get((rule, moment)) or _MEANING.get(moment, moment)


def share(rule: str, moment: str, h: Mapping[str, Any], t: float) -> float:
    """The sum of the weights of all gradients so far: 1 - b^t of a mean that began at zero, 1 of Adafactor's.

    A moment that changes its rule is scaled by the ratio of the two, so that it stands for the same mean.
    """
    rule = rule.rpartition("(")[2].rstrip(")")
    if rule == "adafactor" or moment not in _MEANING:
        return 1.0
    if "betas" in h:
        beta = h["betas"][1 if moment == "exp_avg_sq" or rule == "lion" else 0]
    else:
        beta = h["momentum"]  # of scale_head
    return float(1 - beta**t) if t else 1.0
