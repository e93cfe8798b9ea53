"""``OptimSpec``: a value on every axis, validated when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from memopt.core.hyperparameters import SpecError
from memopt.core.registry import ENGINES, FORMATS, MASTERS, PARTITIONS, PLACEMENTS, by_sign
from memopt.rules import RULES
from memopt.spec.by_parameter import ByParameter
from memopt.spec.overrides import rule_and_format
from memopt.spec.placement_options import checked
from memopt.spec.values import check_format, check_pair, check_value, one_spelling


class OptimSpec(ByParameter):
    """A value on the axes *rule*, *format*, *master*, *placement*, *partition* and *engine*.

    ``format`` is one for all moments, or two with a dot between them: ``"8bit.factored"`` keeps signed moments
    (``exp_avg``, ``momentum_buffer``) in 8 bits and non-negative ones (``exp_avg_sq``) factored. Without one it is the
    rule's default. ``overrides`` maps shell-style patterns over parameter names to
    ``FORMAT``, ``RULE``, ``RULE-FORMAT`` or nothing, with or without ``@PLACEMENT``; the first pattern that matches
    wins, and one that matches nothing is an error when the optimizer is built or priced. ``fallback`` is
    ``RULE[-FORMAT]``, for the parameters that a rule of matrices does not take. ``hyper`` are hyperparameters of the
    rule, ``rules`` those of the others, by their name, ``options`` what placements are told
    (:data:`memopt.spec.placement_options.OPTIONS`).

    Raises :class:`SpecError` for a value that does not exist or a combination that means nothing.

    >>> OptimSpec(rule="adamw", format="8bit", placement="paged")
    OptimSpec('adamw-8bit@paged')
    >>> OptimSpec(rule="adamw", format="8bit.factored").formats
    ('8bit', 'factored')
    >>> OptimSpec(rule="lion", format="factored")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    memopt.core.hyperparameters.SpecError: 'lion-factored': no moment of lion has a factored form; nearest: lion, ...
    """

    __slots__ = ()

    def _validate(self) -> None:
        check_value("rule", self.rule, RULES)
        rule = RULES[self.rule]
        set_ = object.__setattr__
        set_(self, "format", one_spelling(self.format or rule.default_format))
        for fmt in self.formats:
            check_value("format", fmt, FORMATS)
        for axis, values in (
            ("master", MASTERS),
            ("placement", PLACEMENTS),
            ("partition", PARTITIONS),
            ("engine", ENGINES),
        ):
            check_value(axis, getattr(self, axis), values)
        set_(self, "overrides", MappingProxyType(dict(self.overrides)))
        set_(self, "hyper", MappingProxyType(dict(self.hyper)))
        set_(self, "rules", MappingProxyType({name: MappingProxyType(dict(h)) for name, h in self.rules.items()}))
        options = checked(self.options, self.placements, self.partition) if self.options else {}
        set_(self, "options", MappingProxyType(options))
        set_(self, "fallback", self._whole_fallback())
        set_(self, "rule_names", self._named_rules())
        self._check_rules()
        check_format(self.rule, self.format, str(self), self.hyper)
        reason = ENGINES[self.engine].refuse(self)
        if reason:
            raise SpecError(f"'{self}' with engine={self.engine!r}: {reason}")
        for pattern in self.overrides:
            self._override(pattern)

    def _whole_fallback(self) -> str:
        """``fallback`` as it is spelled in the spec: with its format where that is not the spec's."""
        own = RULES[self.rule]
        if own.declines is None:
            if self.fallback:
                raise SpecError(f"{self.rule} takes every parameter and has no fallback; got {self.fallback!r}")
            return ""
        given = self.fallback or own.fallback
        rule, fmt = rule_and_format(given, f"the fallback {given!r}")
        if RULES[rule].declines is not None:
            raise SpecError(f"the fallback {given!r} does not take every parameter; a fallback is a rule such as adamw")
        return f"{rule}-{fmt}" if fmt and fmt != self._inherited(rule) else rule

    def _check_rules(self) -> None:
        names = self.rule_names
        for name in self.rules:
            if name == self.rule or name not in names:
                others = ", ".join(names[1:]) or "none"
                raise SpecError(
                    f"rules={{{name!r}: ...}} are hyperparameters of a rule beside {self.rule}; this spec has {others}"
                )
        for name in names:
            RULES[name].resolve(self.given(name))
        if len(names) > 1 and self.engine != "native":
            raise SpecError(f"'{self}' with engine={self.engine!r}: rules by parameter are the native engine's")

    def hyper_for(self, name: str, shape: tuple[int, ...], kind: str = "") -> dict[str, Any]:
        """The hyperparameters that a parameter has, with its ``"rule"`` where there are several.

        Args:
            name: the parameter's, as overrides match it.
            shape: its global shape.
            kind: what its module says that it is (:mod:`memopt.core.param_kinds`). Default "", not known.
        """
        rule = self.rule_for(name, shape, kind)
        return {**self.resolve(rule=rule), **({"rule": rule} if self.is_mixed else {})}

    def alone(self, name: str, shape: tuple[int, ...], kind: str = "") -> OptimSpec:
        """The spec of one parameter, without overrides.

        Args:
            name: the parameter's, as overrides match it.
            shape: its global shape.
            kind: what its module says that it is (:mod:`memopt.core.param_kinds`). Default "", not known.
        """
        rule, placement = self.rule_for(name, shape, kind), self.for_parameter(name)[1]
        fallback = self.fallback if rule == self.rule else ""
        used = {k: v for k, v in self.rules.items() if fallback and k == rule_and_format(fallback, "")[0]}
        return self.replace(
            rule=rule,
            format=self.format_for(name, rule),
            fallback=fallback,
            placement=placement,
            overrides={},
            hyper=self.given(rule),
            rules=used,
        )

    def resolve(self, given: Mapping[str, Any] | None = None, rule: str = "") -> dict[str, Any]:
        """Every hyperparameter of the rule, or of another of the spec's, with its value, checked against the formats in
        use.

        Args:
            given: values in the place of the spec's. Default none.
            rule: one of :attr:`rule_names`. Default the spec's rule.

        Raises:
            SpecError: for a name that the rule does not have, and a value that is not allowed.
        """
        name = rule or self.rule
        h = RULES[name].resolve({**self.given(name), **(given or {})})
        self._check_hyper(name, h)
        for fmt in (text for text in self._formats_of(name) if "." in text):
            check_pair(name, fmt, RULES[name].moments(h, (2, 2)))
        return h

    def check_live(self, h: Mapping[str, Any], rule: str = "") -> None:
        """The combinations of values that :meth:`resolve` refuses, of values that were set later. What has no moments
        is not held against a format: state that is switched off may stay.

        Args:
            h: every hyperparameter of the rule, with its value.
            rule: one of :attr:`rule_names`. Default the spec's rule.

        Raises:
            SpecError: for values that mean nothing together, or with the formats in use.
        """
        name = rule or self.rule
        if RULES[name].moments(h, (2, 2)):
            self._check_hyper(name, h)

    def _formats_of(self, rule: str) -> set[str]:
        """The formats in which parameters of a rule may be kept."""
        overrides = [self._override(pattern) for pattern in self.overrides]
        found = {o.format or self._inherited(rule) for o in overrides if (o.rule or self.rule) == rule}
        if self.rule in (rule, RULES[rule].part_of):
            found.add(self._inherited(rule))
        elif self.fallback:
            named, fmt = rule_and_format(self.fallback, "")
            found |= {fmt or self._inherited(rule)} if named == rule else set()
            # An override that names a format alone may be of parameters that the rule does not take.
            found |= {o.format for o in overrides if not o.rule and o.format and named == rule}
        return found

    def _check_hyper(self, rule: str, h: Mapping[str, Any]) -> None:
        for fmt in {one for text in self._formats_of(rule) for one in by_sign(text)}:
            reason = RULES[rule].refuse(h, fmt)
            if reason:
                nearest = self.replace(format="32bit", overrides={}, hyper={}, rules={}, options={})
                raise SpecError(f"'{self}': {reason}; nearest: {nearest}")
        reason = ENGINES[self.engine].refuse_hyper(self, h)
        if reason:
            raise SpecError(f"'{self}' with engine={self.engine!r}: {reason}")
