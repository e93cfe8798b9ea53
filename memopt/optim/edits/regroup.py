"""Param groups of one rule each, in the place of those that a conversion finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memopt.optim.edits.param_groups import has_shape

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.optim.parts import OptimizerParts
    from memopt.spec import OptimSpec


@contextmanager
def regrouped(optimizer: OptimizerParts, new: OptimSpec) -> Iterator[Sequence[str]]:
    """The rule of each param group under the new spec. A group whose parameters would be of several is split: the first
    of them stays the object that it is, the others come behind it, and all have the values that it had. Where the
    conversion is refused the groups are as they were."""
    groups = optimizer.param_groups
    before = [(group, list(group["params"]), group.get("param_names")) for group in groups]
    chosen = _rules(optimizer, new)
    found: list[tuple[dict[str, Any], str]] = []
    for group, members in zip(list(groups), chosen, strict=True):
        found += _split(group, members, new.rule_names) if members else [(group, _of_empty(group, optimizer.spec, new))]
    if len(found) > len(groups):
        groups[:] = [group for group, _ in found]
        optimizer.params.remember(edited=True)
    try:
        yield [rule for _, rule in found]
    except BaseException:
        if len(found) > len(before):
            groups[:] = [group for group, _, _ in before]
            for group, params, names in before:
                group["params"] = params
                if names is not None:
                    group["param_names"] = names
            optimizer.params.remember(edited=True)
        raise


def _of_empty(group: dict[str, Any], old: OptimSpec, new: OptimSpec) -> str:
    """The rule of a group without parameters: the one that it had, where it can."""
    rule = old.rule_of(group)
    return rule if old.rule == new.rule and rule in new.rule_names else new.rule


def _rules(optimizer: OptimizerParts, new: OptimSpec) -> list[list[tuple[str, str, Tensor]]]:
    """``(rule, name, parameter)`` of each group's parameters. A rule that was chosen once stays where it can."""
    old, kinds = optimizer.spec, optimizer.kinds
    found: dict[int, list[tuple[str, str, Tensor]]] = {id(group): [] for group in optimizer.param_groups}
    same = old.is_mixed and new.is_mixed and old.rule == new.rule and old.rule_names == new.rule_names
    for name, p, group in optimizer.params.entries():
        if same and dict(old.overrides) == dict(new.overrides):
            rule = old.rule_of(group)
        else:
            rule = new.rule_for(name, tuple(p.shape) if has_shape(p) else (), kinds.get(name, ""))
        found[id(group)].append((rule, name, p))
    return list(found.values())


def _split(
    group: dict[str, Any], members: list[tuple[str, str, Tensor]], order: Sequence[str]
) -> list[tuple[dict[str, Any], str]]:
    here = {rule for rule, _, _ in members}
    rules = [rule for rule in order if rule in here]
    if len(rules) == 1:
        return [(group, rules[0])]
    named = "param_names" in group
    parts: list[tuple[dict[str, Any], str]] = []
    for i, rule in enumerate(rules):
        one = group if i == 0 else dict(group)
        parts.append((one, rule))
    for one, rule in parts:
        one["params"] = [p for r, _, p in members if r == rule]
        if named:
            one["param_names"] = [name for r, name, _ in members if r == rule]
    return parts
