"""Param groups as their owner has changed them since they were made: who is who, and values that mean nothing.

``group["params"]`` is a list like any other, and people filter it, append to it and put other tensors into it; groups
are removed, appended and swapped. A parameter keeps its name, and with it its overrides and its place on the disk, as
long as it lives; names in ``group["param_names"]`` are put right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from memopt.core.hyperparameters import SpecError, check_live, check_max_grad_norm
from memopt.core.param_names import clean_name
from memopt.optim.edits.group_checks import check_group
from memopt.optim.edits.rule_groups import split
from memopt.rules import RULES

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.spec import OptimSpec

ParamGroups = Sequence[dict[str, Any]]


def has_shape(p: Tensor) -> bool:
    """False for a parameter of a lazy module that has not seen data: nothing about it is known yet."""
    from torch.nn.parameter import is_lazy

    return not is_lazy(p)


class _Seen(NamedTuple):
    """A group as it was when names were given."""

    group: dict[str, Any]
    params: list[ref[Tensor]]
    written: list[str] | None  # what was put under "param_names"
    names: list[str]

    def same(self, group: dict[str, Any]) -> bool:
        params = group["params"]
        if group is not self.group or len(params) != len(self.params) or group.get("param_names") != self.written:
            return False
        return all(weak() is p for weak, p in zip(self.params, params, strict=True))


class LiveGroups:
    """The groups of one optimizer, looked at whenever they are used."""

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self._names: dict[int, tuple[ref[Tensor], str]] = {}  # by identity, of every parameter that was ever here
        self._values: dict[int, list[Any]] = {}
        self._states: dict[int, str] = {}  # by identity of the state, whose state it is
        self._unnamed = 0
        #: How many parameters took the place of another one, in its place.
        self.swapped = 0

    def changed(self, groups: ParamGroups) -> bool:
        """Whether parameters or names are others than when :meth:`names` was called last."""
        return len(groups) != len(self._seen) or not all(s.same(g) for s, g in zip(self._seen, groups, strict=True))

    def note_state(self, name: str, state: Mapping[str, Any]) -> None:
        """This is the state of the parameter of this name: who moves it to another tensor moves the name with it."""
        self._states[id(state)] = name

    def names(self, groups: ParamGroups, spec: OptimSpec, state: Mapping[Any, Any]) -> Iterator[list[str]]:
        """The names of each group's parameters; without names, numbers."""
        if self.changed(groups):
            self._look(groups, spec, state)
        return (seen.names for seen in self._seen)

    # Who is who ------------------------------------------------------------------------------------------------

    def _look(self, groups: ParamGroups, spec: OptimSpec, state: Mapping[Any, Any]) -> None:
        before = {id(seen.group): seen for seen in self._seen}
        self._names = {key: (weak, name) for key, (weak, name) in self._names.items() if weak() is not None}
        self._check_new(groups, spec, before)
        named = any("param_names" in group for group in groups if group["params"])
        present = {id(p) for group in groups for p in group["params"]}
        claimed = {name for p, name in self._alive() if id(p) in present}
        stated = self._stated(groups, before)
        found = []
        for group, own in zip(groups, stated, strict=True):
            gone = self._gone(before.get(id(group)), group["params"], present)
            if own is not None:
                names = own
            else:
                names = [
                    self._name_of(p)
                    or self._unclaimed(self._states.get(id(state.get(p))), claimed)
                    or self._unclaimed(gone[i], claimed)
                    or self._fresh(claimed, named)
                    for i, p in enumerate(group["params"])
                ]
            for p, name in zip(group["params"], names, strict=True):
                self._names[id(p)] = ref(p), name
                claimed.add(name)
            written = None
            if named or "param_names" in group:
                written = group["param_names"] = list(names)
            found.append(_Seen(group, [ref(p) for p in group["params"]], written and list(written), list(names)))
        self._seen = found

    def _stated(self, groups: ParamGroups, before: dict[int, _Seen]) -> list[list[str] | None]:
        """The names that a group has been given, where that is news, without wrappers' parts."""
        news: list[list[str] | None] = []
        for group in groups:
            names, seen = group.get("param_names"), before.get(id(group))
            news.append(None)
            if names is not None and len(names) == len(group["params"]) and (seen is None or names != seen.written):
                news[-1] = list(names)
        return [None if names is None else [clean_name(name) for name in names] for names in news]

    def _check_new(self, groups: ParamGroups, spec: OptimSpec, before: dict[int, _Seen]) -> None:
        """What stands in the groups now is what an optimizer can take, or SpecError. New groups get what they lack."""
        seen: set[int] = set()
        for group in groups:
            if id(group) not in before and len(parts := split(group, spec, {})) == 1 and "rule" in parts[0]:
                group["rule"] = parts[0]["rule"]
            elif id(group) not in before and len(parts) > 1:
                raise SpecError(
                    f"a param group was appended whose parameters are of {' and of '.join(g['rule'] for g in parts)}; "
                    "opt.add_param_group makes one of each"
                )
            checked = check_group(group, spec, seen, live=id(group) in before)
            if id(group) not in before:
                for key, value in checked.items():
                    group.setdefault(key, value)

    def _gone(self, seen: _Seen | None, params: list[Tensor], present: set[int]) -> list[str | None]:
        """For each place of a group the name of the parameter that stood there and is gone from all groups."""
        if seen is None or len(seen.params) != len(params):
            return [None] * len(params)
        left = [
            name if weak() is None or id(weak()) not in present else None
            for weak, name in zip(seen.params, seen.names, strict=True)
        ]
        self.swapped += sum(name is not None for name in left)
        return left

    def _alive(self) -> Iterator[tuple[Tensor, str]]:
        for weak, name in self._names.values():
            p = weak()
            if p is not None:
                yield p, name

    def _name_of(self, p: Tensor) -> str | None:
        weak, name = self._names.get(id(p), (None, None))
        return name if weak is not None and weak() is p else None

    @staticmethod
    def _unclaimed(name: str | None, claimed: set[str]) -> str | None:
        return name if name is not None and name not in claimed else None

    def _fresh(self, claimed: set[str], named: bool) -> str:
        taken = claimed | {name for _, name in self._alive()}
        while True:
            name = f"unnamed_{self._unnamed}" if named else str(self._unnamed)
            self._unnamed += 1
            if name not in taken:
                return name

    # What values mean ------------------------------------------------------------------------------------------

    def check_values(self, groups: ParamGroups, spec: OptimSpec) -> None:
        """Raise SpecError, before anything is stepped, for a value that was set to what means nothing."""
        for group in groups:
            name = spec.rule_of(group)
            rule = RULES[name] if name in spec.rule_names else None
            if rule is None:
                raise SpecError(f"a param group is of the rule {name!r}; '{spec}' has {', '.join(spec.rule_names)}")
            try:
                values = [*(group[key] for key in rule.hyperparameters), group.get("max_grad_norm")]
            except KeyError as missing:
                raise SpecError(f"a param group has lost {missing}, which {name} needs") from None
            before = self._values.get(id(group))
            if before is not None and len(before) == len(values) and all(map(is_, values, before)):
                continue
            h = dict(zip(rule.hyperparameters, values, strict=False))
            check_live(name, h, rule.checks)
            spec.check_live(h, name)
            check_max_grad_norm(values[-1], spec.engine)
            self._values[id(group)] = values
