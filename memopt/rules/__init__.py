"""The update rules, one file each. ``RULES`` is the axis: name -> :class:`~memopt.rules.base.Rule`."""

from memopt.axis import Axis
from memopt.rules.base import Moment, Rule
from memopt.rules.wrapped import Rules

#: The name of a rule is that of its file.
_PLAIN = (
    "adamw",
    "adam",
    "adafactor",
    "came",
    "lion",
    "sgd",
    "rmsprop",
    "radam",
    "adabound",
    "lamb",
    "ademamix",
    "adammini",
    "stableadamw",
)

RULES = Rules({name: f"{name}.RULE" for name in _PLAIN}, Axis("memopt.rules", {"lookahead": "lookahead.wrap"}))

__all__ = ["RULES", "Moment", "Rule"]
