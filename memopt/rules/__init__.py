"""The update rules, one file each. ``RULES`` is the axis: name -> :class:`~memopt.rules.base.Rule`."""

from __future__ import annotations

from memopt.rules import (
    adabound,
    adafactor,
    adam,
    adammini,
    adamw,
    ademamix,
    came,
    lamb,
    lion,
    lookahead,
    radam,
    rmsprop,
    sgd,
    stableadamw,
)
from memopt.rules.base import Moment, Rule
from memopt.rules.wrapped import Rules

RULES = Rules(
    {m.RULE.name: m.RULE for m in (adamw, adam, adafactor, came, lion, sgd, rmsprop, radam,
                                   adabound, lamb, ademamix, adammini, stableadamw)},
    wrappers={"lookahead": lookahead.wrap},
)  # fmt: skip

__all__ = ["RULES", "Moment", "Rule"]
