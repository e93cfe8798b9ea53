"""What a spec says of one parameter, by its name, its shape and its group: rule, format and placement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from memopt.core.hyperparameters import SpecError
from memopt.core.param_kinds import kind_of_name
from memopt.core.param_names import clean_pattern
from memopt.core.registry import by_sign
from memopt.rules import RULES
from memopt.spec.overrides import Override, parse_override, rule_and_format
from memopt.spec.spec_fields import SpecFields

#: Of the hyperparameters of a spec's rule those that its other rules have too, unless ``rules`` gives them their own.
SHARED = ("lr", "weight_decay", "maximize", "cautious")
Spec = TypeVar("Spec", bound="ByParameter")


class ByParameter(SpecFields):
    """The fields of a spec, looked up for a parameter: the first override that matches, else the spec's rule where that
    takes it, else the fallback."""

    __slots__ = ("rule_names",)

    #: The spec's rule, its fallback's, and those of its overrides.
    rule_names: tuple[str, ...]

    def _inherited(self, rule: str) -> str:
        """The format of a rule that is named without one: the spec's, or its own default where the spec has its."""
        own = self.rule == rule or self.format != RULES[self.rule].default_format
        return self.format if own else RULES[rule].default_format

    def _named_rules(self) -> tuple[str, ...]:
        named = [
            self.rule,
            *RULES[self.rule].companions.values(),
            *([rule_and_format(self.fallback, "")[0]] if self.fallback else []),
        ]
        named += [o.rule for o in map(self._override, self.overrides) if o.rule]
        return tuple(dict.fromkeys(named))

    @property
    def is_mixed(self) -> bool:
        """Whether parameters may have different rules: then each param group is of one, which it says under
        ``"rule"``."""
        return bool(self.fallback) or len(self.rule_names) > 1

    def given(self, rule: str) -> dict[str, Any]:
        """The hyperparameters that the spec gives one of its rules; those at their defaults are not in it.

        Args:
            rule: one of :attr:`rule_names`.
        """
        if rule == self.rule:
            return dict(self.hyper)
        own = RULES[rule].hyperparameters
        return {**{k: self.hyper[k] for k in SHARED if k in self.hyper and k in own}, **self.rules.get(rule, {})}

    def rule_of(self, group: Mapping[str, Any]) -> str:
        """The rule of a param group.

        Args:
            group: of an optimizer of this spec; its ``"rule"`` counts where the spec has several.
        """
        return str(group.get("rule", self.rule)) if self.is_mixed else self.rule

    def rule_for(self, name: str, shape: tuple[int, ...], kind: str = "") -> str:
        """The rule that steps a parameter: its override's, else the spec's where that takes it, else the fallback.

        Args:
            name: the parameter's, as overrides match it.
            shape: its global shape.
            kind: what its module says that it is (:mod:`memopt.core.param_kinds`). Default "", not known.
        """
        if not self.is_mixed:
            return self.rule
        chosen = self._of_name(name)
        if chosen is not None and chosen.rule:
            return chosen.rule
        chosen_rule = RULES[self.rule]
        other = chosen_rule.companions.get(kind or kind_of_name(name)) if chosen_rule.companions else None
        for rule in (other, self.rule) if other else (self.rule,):
            declines = RULES[rule].declines
            if declines is None or declines(name, shape, kind) is None:
                return rule
        return rule_and_format(self.fallback, "")[0]

    def format_for(self, name: str, rule: str) -> str:
        """The format that the spec names for a parameter, or two with a dot between them.

        Args:
            name: the parameter's, as overrides match it.
            rule: that steps it.
        """
        chosen = self._of_name(name)
        if chosen is not None and chosen.format:
            return chosen.format
        named, fmt = rule_and_format(self.fallback, "") if self.fallback else ("", "")
        if rule == named and fmt and not (chosen is not None and chosen.rule):
            return fmt
        return self._inherited(rule)

    def for_parameter(self, name: str) -> tuple[str, str, str | None]:
        """``(format, placement, pattern)`` for a parameter: the first override that matches its name, or the spec's.
        The format is that of the spec's rule, or of the override's; :meth:`format_for` knows the fallback's.

        Args:
            name: the parameter's, as overrides match it.
        """
        chosen = self._of_name(name)
        if chosen is None:
            return self.format, self.placement, None
        return self.format_for(name, chosen.rule or self.rule), chosen.placement, chosen.pattern

    def for_names(self: Spec, names: list[str]) -> Spec:
        """This spec for parameters of these names: a pattern that names a wrapper's prefix (``module.``,
        ``_orig_mod.``) and matches none of them goes without it.

        Args:
            names: of all parameters.

        Raises:
            SpecError: for a pattern that is the first match of no name.
        """
        if not self.overrides:
            return self
        used = {self.for_parameter(name)[2] for name in names}
        unused = [pattern for pattern in self.overrides if pattern not in used]
        if unused:
            plain = {clean_pattern(p) if p in unused else p: value for p, value in self.overrides.items()}
            if plain.keys() != self.overrides.keys():
                return self.replace(overrides=plain).for_names(names)
        for pattern in unused:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise SpecError(f"overrides: {pattern!r} is the first match of no parameter; the names are {shown}")
        return self

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of signed and of non-negative moments."""
        return by_sign(self.format)

    @property
    def placements(self) -> set[str]:
        """The spec's placement and those of its overrides."""
        named = (text.partition("@")[2] for text in self.overrides.values() if isinstance(text, str))
        return {self.placement, *(placement for placement in named if placement)}

    def _override(self, pattern: str) -> Override:
        return parse_override(pattern, self.overrides[pattern], self.placement, (self.rule, self.fallback))

    def _of_name(self, name: str) -> Override | None:
        """The first override that matches a name."""
        if self.overrides:
            from fnmatch import fnmatchcase

            for pattern in self.overrides:
                if fnmatchcase(name, pattern):
                    return self._override(pattern)
        return None
