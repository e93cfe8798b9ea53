"""The update rules, one file each. ``RULES`` is the axis: name -> :class:`~memopt.rules.base.Rule`."""

from memopt.rules import adafactor, adam, adamw, came, lion, radam, rmsprop, sgd
from memopt.rules.base import Moment, Rule

RULES: dict[str, Rule] = {m.RULE.name: m.RULE for m in (adamw, adam, adafactor, came, lion, sgd, rmsprop, radam)}

__all__ = ["RULES", "Moment", "Rule"]
