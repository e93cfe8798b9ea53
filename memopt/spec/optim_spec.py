"""``OptimSpec``: a value on every axis, validated when it is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from memopt.core.hyperparameters import SpecError
from memopt.core.param_names import clean_pattern
from memopt.core.registry import ENGINES, FORMATS, MASTERS, PARTITIONS, PLACEMENTS, by_sign
from memopt.rules import RULES, Moment
from memopt.spec.aliases import ALIASES
from memopt.spec.placement_options import checked
from memopt.spec.values import SIGNED, Override, check_pair, known, known_format, one_spelling, plain

_OVERRIDE = re.compile(r"(?P<what>[a-z0-9_.-]+(?:\([a-z0-9]+\)[a-z0-9.-]*)?)?(?:@(?P<placement>[a-z0-9]+))?")


#: The axes, then what is not on one.
FIELDS = (
    "rule",
    "format",
    "fallback",
    "master",
    "placement",
    "partition",
    "engine",
    "overrides",
    "hyper",
    "rules",
    "options",
)
#: Of the hyperparameters of a spec's rule those that its other rules have too, unless ``rules`` gives them their own.
SHARED = ("lr", "weight_decay", "maximize")


class OptimSpec:
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

    # Written out rather than a dataclass: importing dataclasses takes longer than all else that an estimate does.
    __slots__ = FIELDS

    rule: str
    format: str
    fallback: str
    master: str
    placement: str
    partition: str
    engine: str
    overrides: Mapping[str, str]
    hyper: Mapping[str, Any]
    rules: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]

    def __init__(
        self,
        *,
        rule: str,
        format: str = "",
        fallback: str = "",
        master: str = "none",
        placement: str = "device",
        partition: str = "none",
        engine: str = "native",
        overrides: Mapping[str, str] = MappingProxyType({}),
        hyper: Mapping[str, Any] = MappingProxyType({}),
        rules: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        values = (rule, format, fallback, master, placement, partition, engine, overrides, hyper, rules, options)
        for name, value in zip(FIELDS, values, strict=True):
            object.__setattr__(self, name, value)
        self._validate()

    def __hash__(self) -> int:
        return hash((str(self), self.engine, tuple(self.overrides.items()), tuple(self.hyper)))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"an OptimSpec cannot be changed; make another with replace({name}=...)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("an OptimSpec cannot be changed")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OptimSpec):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in FIELDS)

    def replace(self, **changes: Any) -> OptimSpec:
        """The same spec with other values of some fields."""
        return OptimSpec(**{**{name: getattr(self, name) for name in FIELDS}, **changes})

    def _validate(self) -> None:
        known("rule", self.rule, RULES)
        rule = RULES[self.rule]
        set_ = object.__setattr__
        set_(self, "format", one_spelling(self.format or rule.default_format))
        for fmt in self.formats:
            known("format", fmt, FORMATS)
        for axis, values in (
            ("master", MASTERS),
            ("placement", PLACEMENTS),
            ("partition", PARTITIONS),
            ("engine", ENGINES),
        ):
            known(axis, getattr(self, axis), values)
        set_(self, "overrides", MappingProxyType(dict(self.overrides)))
        set_(self, "hyper", MappingProxyType(dict(self.hyper)))
        set_(self, "rules", MappingProxyType({name: MappingProxyType(dict(h)) for name, h in self.rules.items()}))
        options = checked(self.options, self.placements, self.partition) if self.options else {}
        set_(self, "options", MappingProxyType(options))
        set_(self, "fallback", self._whole_fallback())
        self._check_rules()
        self._check_formats()
        reason = ENGINES[self.engine].refuse(self)
        if reason:
            raise SpecError(f"'{self}' with engine={self.engine!r}: {reason}")
        for pattern in self.overrides:
            self._override(pattern)

    # Rules by parameter ----------------------------------------------------------------------------------------

    def _whole_fallback(self) -> str:
        """``fallback`` as it is spelled in the spec: with its format where that is not the spec's."""
        own = RULES[self.rule]
        if own.declines is None:
            if self.fallback:
                raise SpecError(f"{self.rule} takes every parameter and has no fallback; got {self.fallback!r}")
            return ""
        given = self.fallback or own.fallback
        rule, fmt = _rule_and_format(given, f"the fallback {given!r}")
        if RULES[rule].declines is not None:
            raise SpecError(f"the fallback {given!r} does not take every parameter; a fallback is a rule such as adamw")
        return f"{rule}-{fmt}" if fmt and fmt != self._inherited(rule) else rule

    def _inherited(self, rule: str) -> str:
        """The format of a rule that is named without one: the spec's, or its own default where the spec has its."""
        own = self.rule == rule or self.format != RULES[self.rule].default_format
        return self.format if own else RULES[rule].default_format

    @property
    def rule_names(self) -> tuple[str, ...]:
        """The spec's rule, its fallback's, and those of its overrides."""
        named = [self.rule, *([_rule_and_format(self.fallback, "")[0]] if self.fallback else [])]
        named += [o.rule for o in map(self._override, self.overrides) if o.rule]
        return tuple(dict.fromkeys(named))

    @property
    def is_mixed(self) -> bool:
        """Whether parameters may have different rules: then each param group is of one, which it says under
        ``"rule"``."""
        return bool(self.fallback) or len(self.rule_names) > 1

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

    def given(self, rule: str) -> dict[str, Any]:
        """The hyperparameters that the spec gives one of its rules."""
        if rule == self.rule:
            return dict(self.hyper)
        own = RULES[rule].hyperparameters
        return {**{k: self.hyper[k] for k in SHARED if k in self.hyper and k in own}, **self.rules.get(rule, {})}

    def rule_of(self, group: Mapping[str, Any]) -> str:
        """The rule of a param group."""
        return str(group.get("rule", self.rule)) if self.is_mixed else self.rule

    def rule_for(self, name: str, shape: tuple[int, ...], kind: str = "") -> str:
        """The rule that steps a parameter: its override's, else the spec's where that takes it, else the fallback.
        ``kind`` is what its module says that it is (:mod:`memopt.core.param_kinds`)."""
        if not self.is_mixed:
            return self.rule
        chosen = self._of_name(name)
        if chosen is not None and chosen.rule:
            return chosen.rule
        declines = RULES[self.rule].declines
        if declines is None or declines(name, shape, kind) is None:
            return self.rule
        return _rule_and_format(self.fallback, "")[0]

    def format_for(self, name: str, rule: str) -> str:
        """The format that the spec names for a parameter of this rule."""
        chosen = self._of_name(name)
        if chosen is not None and chosen.format:
            return chosen.format
        named, fmt = _rule_and_format(self.fallback, "") if self.fallback else ("", "")
        if rule == named and fmt and not (chosen is not None and chosen.rule):
            return fmt
        return self._inherited(rule)

    def hyper_for(self, name: str, shape: tuple[int, ...], kind: str = "") -> dict[str, Any]:
        """The hyperparameters that a parameter has, with its rule where there are several."""
        rule = self.rule_for(name, shape, kind)
        return {**self.resolve(rule=rule), **({"rule": rule} if self.is_mixed else {})}

    def alone(self, name: str, shape: tuple[int, ...], kind: str = "") -> OptimSpec:
        """The spec of one parameter: without overrides."""
        rule, placement = self.rule_for(name, shape, kind), self.for_parameter(name)[1]
        fallback = self.fallback if rule == self.rule else ""
        used = {k: v for k, v in self.rules.items() if fallback and k == _rule_and_format(fallback, "")[0]}
        return self.replace(
            rule=rule,
            format=self.format_for(name, rule),
            fallback=fallback,
            placement=placement,
            overrides={},
            hyper=self.given(rule),
            rules=used,
        )

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of signed and of non-negative moments."""
        return by_sign(self.format)

    def _check_formats(self) -> None:
        rule = RULES[self.rule]
        signed, non_negative = self.formats
        if non_negative == "factored" and not any(m.factorable for m in self._all_moments()):
            nearest = f"{self.rule}, {self.rule}-{'8bit' if signed == 'factored' else signed}"
            raise SpecError(f"'{self}': no moment of {self.rule} has a factored form; nearest: {nearest}")
        if signed == non_negative:
            return
        if "." in self.format:
            every = {**rule.hyperparameters, **rule.example, **dict.fromkeys(rule.moments_by, 0.5)}
            check_pair(self.rule, self.format, rule.moments(every, (2, 2)))
        reason = FORMATS[signed].declines(SIGNED, (4096, 4096))
        if reason:
            raise SpecError(f"'{self}': {reason}; nearest: {self.rule}-{one_spelling(f'8bit.{non_negative}')}")

    @property
    def placements(self) -> set[str]:
        """The spec's placement and those of its overrides."""
        named = (text.partition("@")[2] for text in self.overrides.values() if isinstance(text, str))
        return {self.placement, *(placement for placement in named if placement)}

    def _all_moments(self) -> tuple[Moment, ...]:
        rule = RULES[self.rule]
        return rule.moments(rule.resolve({**self.hyper, **rule.example}), (2, 2))

    def _override(self, pattern: str) -> Override:
        text = self.overrides[pattern]
        match = _OVERRIDE.fullmatch(text) if isinstance(text, str) and text else None
        if match is None:
            raise SpecError(
                f"overrides[{pattern!r}] = {text!r} is not FORMAT, RULE or RULE-FORMAT, with or without @PLACEMENT"
            )
        what, placement = match["what"] or "", match["placement"] or self.placement
        known("placement", placement, PLACEMENTS)
        what = ALIASES.get(what, what)
        if what in RULES or "-" in what:
            return Override(*_rule_and_format(what, f"overrides[{pattern!r}] = {text!r}"), placement, pattern)
        if what:
            what = known_format(what)
            _check_format_of((self.rule, _rule_and_format(self.fallback, "")[0] if self.fallback else ""), what)
        return Override("", what, placement, pattern)

    def _of_name(self, name: str) -> Override | None:
        """The first override that matches a name."""
        if self.overrides:
            from fnmatch import fnmatchcase

            for pattern in self.overrides:
                if fnmatchcase(name, pattern):
                    return self._override(pattern)
        return None

    def for_parameter(self, name: str) -> tuple[str, str, str | None]:
        """``(format, placement, pattern)`` for a parameter: the first override that matches its name, or the spec's.
        The format is that of the spec's rule, or of the override's; :meth:`format_for` knows the fallback's."""
        chosen = self._of_name(name)
        if chosen is None:
            return self.format, self.placement, None
        return self.format_for(name, chosen.rule or self.rule), chosen.placement, chosen.pattern

    def for_names(self, names: list[str]) -> OptimSpec:
        """This spec for parameters of these names: a pattern that names a wrapper's prefix (``module.``,
        ``_orig_mod.``) and matches none of them goes without it. Raises :class:`SpecError` for a pattern that is the
        first match of no name."""
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

    def resolve(self, given: Mapping[str, Any] | None = None, rule: str = "") -> dict[str, Any]:
        """Every hyperparameter of the rule, or of another of the spec's, with its value, checked against the formats in
        use."""
        name = rule or self.rule
        h = RULES[name].resolve({**self.given(name), **(given or {})})
        self._check_hyper(name, h)
        for fmt in (text for text in self._formats_of(name) if "." in text):
            check_pair(name, fmt, RULES[name].moments(h, (2, 2)))
        return h

    def check_live(self, h: Mapping[str, Any], rule: str = "") -> None:
        """The combinations of values that :meth:`resolve` refuses, of values that were set later. What has no moments
        is not held against a format: state that is switched off may stay."""
        name = rule or self.rule
        if RULES[name].moments(h, (2, 2)):
            self._check_hyper(name, h)

    def _formats_of(self, rule: str) -> set[str]:
        """The formats in which parameters of a rule may be kept."""
        overrides = [self._override(pattern) for pattern in self.overrides]
        found = {o.format or self._inherited(rule) for o in overrides if (o.rule or self.rule) == rule}
        if rule == self.rule:
            found.add(self.format)
        elif self.fallback:
            named, fmt = _rule_and_format(self.fallback, "")
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

    def __str__(self) -> str:
        default = RULES[self.rule].default_format if self.rule in RULES else ""
        return (
            self.rule
            + (f"-{self.format}" if self.format != default else "")
            + (f"({self.fallback})" if self.fallback else "")
            + (f"+{self.master}" if self.master != "none" else "")
            + (f"@{self.placement}" if self.placement != "device" else "")
            + (f"/{self.partition}" if self.partition != "none" else "")
        )

    def __repr__(self) -> str:
        fields = ("overrides", "hyper", "rules", "options")
        extra = [f"{k}={plain(getattr(self, k))!r}" for k in fields if getattr(self, k)]
        if self.engine != "native":
            extra.insert(0, f"engine={self.engine!r}")
        return f"OptimSpec({', '.join([repr(str(self)), *extra])})"

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in FIELDS}
        return _rebuild, ({k: plain(v) for k, v in fields.items()},)


def _rule_and_format(text: str, what: str) -> tuple[str, str]:
    """``RULE[-FORMAT]``, or another tool's name for it; the format is empty where none is named."""
    text = ALIASES.get(text, text)
    rule, _, fmt = text.partition("-")
    known("rule", rule, RULES)
    if fmt:
        fmt = known_format(fmt)
        try:
            _check_format_of((rule,), fmt)
        except SpecError as error:
            raise SpecError(f"{what}: {error}") from None
    return rule, fmt


@cache
def _check_format_of(rules: tuple[str, ...], fmt: str) -> None:
    """Raise SpecError for a format that none of these rules has; an empty name is none."""
    for last, rule in enumerate(reversed([rule for rule in rules if rule])):
        try:
            OptimSpec(rule=rule, format=fmt)
        except SpecError:
            if last + 1 == sum(map(bool, rules)):
                raise
        else:
            return


def _rebuild(fields: dict[str, Any]) -> OptimSpec:
    return OptimSpec(**fields)
