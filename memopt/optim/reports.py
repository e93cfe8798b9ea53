"""What updates report, summed over parameters and ranks, and told to their rule at the end of a step."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from memopt.partitions.base import sum_over
from memopt.partitions.world import ProcessGroups
from memopt.rules import RULES, Rule

if TYPE_CHECKING:
    from memopt.spec import OptimSpec


@final
class Reports:
    """The sums of one step so far: fp64, for each rule, groups of ranks over which its parameters are cut, and device.
    What every rank steps for itself counts once."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ProcessGroups, torch.device], Tensor] = {}

    def of(self, rule: Rule, groups: ProcessGroups, device: torch.device) -> Tensor:
        """Where a parameter of ``rule``, cut over these groups, adds what it reports: fp64 [rule.reports]."""
        key = rule.name, groups, device
        if key not in self._sums:
            self._sums[key] = torch.zeros(rule.reports, dtype=torch.float64, device=device)
        return self._sums[key]

    def clear(self) -> None:
        """Forget a step that did not happen."""
        self._sums.clear()

    def tell(self, param_groups: Sequence[MutableMapping[str, Any]], spec: OptimSpec) -> None:
        """Call ``after_step`` of each rule that was reported to; one collective for each kind of groups."""
        totals: dict[str, list[float]] = {}
        for (name, groups, _), sums in self._sums.items():
            found = sum_over(sums, groups).tolist()
            totals[name] = list(map(sum, zip(found, totals.get(name, [0.0] * len(found)), strict=True)))
        self._sums.clear()
        for name, found in totals.items():
            after = RULES[name].after_step
            if after is not None:
                after([group for group in param_groups if spec.rule_of(group) == name], found)
