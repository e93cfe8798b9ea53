"""The update rules, one file each. ``RULES`` is the axis: name -> :class:`~memopt.rules.base.Rule`."""

from memopt.core import registry
from memopt.core.registry import Axis
from memopt.rules.base import Moment, Rule

RULES: Axis[Rule] = registry.RULES

__all__ = ["RULES", "Moment", "Rule"]
