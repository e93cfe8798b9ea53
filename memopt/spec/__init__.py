"""``OptimSpec``: a value on every axis, validated when it is made.

RULE[-FORMAT[.FORMAT]][(FALLBACK[-FORMAT])][+MASTER][@PLACEMENT][/PARTITION]; of two formats the second is that of
non-negative moments, and the fallback is the rule of the parameters that RULE does not take.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from memopt.core.hyperparameters import SpecError
from memopt.core.param_names import clean_pattern
from memopt.core.registry import ENGINES, FORMATS, MASTERS, PARTITIONS, PLACEMENTS, WRAPPERS, by_sign
from memopt.rules import RULES, Moment
from memopt.spec.aliases import ALIASES
from memopt.spec.placement_options import checked

_GRAMMAR = re.compile(
    r"(?P<rule>[a-z][a-z0-9]*(?:\([a-z0-9]+\))?)(?:-(?P<format>[a-z0-9]+(?:\.[a-z0-9]+)?))?(?:\+(?P<master>[a-z0-9]+))?"
    r"(?:@(?P<placement>[a-z0-9]+))?(?:/(?P<partition>[a-z0-9]+))?"
)
#: ``lookahead(adamw-8bit)``: what is inside may be a spec, of which the rule alone stays inside.
_WRAPPED = re.compile(r"([a-z0-9]+)\(([^()]*)\)(.*)")
#: ``muon-8bit(adamw)``: rule, format, fallback, the rest.
_FALLBACK = re.compile(r"([a-z][a-z0-9]*)((?:-[a-z0-9.]+)?)\(([^()]+)\)(.*)")
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
        _known("rule", self.rule, RULES)
        rule = RULES[self.rule]
        set_ = object.__setattr__
        set_(self, "format", _one_spelling(self.format or rule.default_format))
        for fmt in self.formats:
            _known("format", fmt, FORMATS)
        for axis, values in (
            ("master", MASTERS),
            ("placement", PLACEMENTS),
            ("partition", PARTITIONS),
            ("engine", ENGINES),
        ):
            _known(axis, getattr(self, axis), values)
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
            _check_pair(self.rule, self.format, rule.moments(every, (2, 2)))
        reason = FORMATS[signed].declines(_SIGNED, (4096, 4096))
        if reason:
            raise SpecError(f"'{self}': {reason}; nearest: {self.rule}-{_one_spelling(f'8bit.{non_negative}')}")

    @property
    def placements(self) -> set[str]:
        """The spec's placement and those of its overrides."""
        named = (text.partition("@")[2] for text in self.overrides.values() if isinstance(text, str))
        return {self.placement, *(placement for placement in named if placement)}

    def _all_moments(self) -> tuple[Moment, ...]:
        rule = RULES[self.rule]
        return rule.moments(rule.resolve({**self.hyper, **rule.example}), (2, 2))

    def _override(self, pattern: str) -> _Override:
        text = self.overrides[pattern]
        match = _OVERRIDE.fullmatch(text) if isinstance(text, str) and text else None
        if match is None:
            raise SpecError(
                f"overrides[{pattern!r}] = {text!r} is not FORMAT, RULE or RULE-FORMAT, with or without @PLACEMENT"
            )
        what, placement = match["what"] or "", match["placement"] or self.placement
        _known("placement", placement, PLACEMENTS)
        what = ALIASES.get(what, what)
        if what in RULES or "-" in what:
            return _Override(*_rule_and_format(what, f"overrides[{pattern!r}] = {text!r}"), placement, pattern)
        if what:
            what = _known_format(what)
            _check_format_of((self.rule, _rule_and_format(self.fallback, "")[0] if self.fallback else ""), what)
        return _Override("", what, placement, pattern)

    def _of_name(self, name: str) -> _Override | None:
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
            _check_pair(name, fmt, RULES[name].moments(h, (2, 2)))
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
        extra = [f"{k}={_plain(getattr(self, k))!r}" for k in fields if getattr(self, k)]
        if self.engine != "native":
            extra.insert(0, f"engine={self.engine!r}")
        return f"OptimSpec({', '.join([repr(str(self)), *extra])})"

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in FIELDS}
        return _rebuild, ({k: _plain(v) for k, v in fields.items()},)


def _plain(value: Any) -> Any:
    """Without views of dictionaries, which pickle cannot carry."""
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, (dict, MappingProxyType)) else value


class _Override(NamedTuple):
    """What an override says: ``rule`` and ``format`` are empty where it names none."""

    rule: str
    format: str
    placement: str
    pattern: str


def _rule_and_format(text: str, what: str) -> tuple[str, str]:
    """``RULE[-FORMAT]``, or another tool's name for it; the format is empty where none is named."""
    text = ALIASES.get(text, text)
    rule, _, fmt = text.partition("-")
    _known("rule", rule, RULES)
    if fmt:
        fmt = _known_format(fmt)
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


#: Whatever a format says of a signed moment.
_SIGNED = Moment("exp_avg")


def _one_spelling(fmt: str) -> str:
    """The shortest spelling of a format or of two: a signed moment has no factored form, and is in 32 bits there."""
    signed, _, non_negative = fmt.partition(".")
    if signed == non_negative:
        return signed
    return "factored" if (signed, non_negative) == ("32bit", "factored") else fmt


def _known_format(fmt: str) -> str:
    """The shortest spelling of a format or of two, which there must be."""
    for one in by_sign(fmt):
        _known("format", one, FORMATS)
    return _one_spelling(fmt)


def _check_pair(rule: str, fmt: str, moments: tuple[Moment, ...]) -> None:
    """Raise SpecError for two formats where these moments are all of one kind."""
    signed, non_negative = by_sign(fmt)
    kinds = {m.signed for m in moments if not m.held}
    if len(kinds) == 1:
        kind, one = ("signed", signed) if True in kinds else ("non-negative", non_negative)
        raise SpecError(
            f"'{rule}-{fmt}': {rule} has no two kinds of moments to keep in two formats, only {kind} ones; "
            f"nearest: {rule}-{one}"
        )


def _known(axis: str, value: Any, allowed: Mapping[str, Any]) -> None:
    if value in allowed:
        return
    from difflib import get_close_matches

    near = get_close_matches(str(value), allowed, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    raise SpecError(f"unknown {axis} {value!r}{guess}; allowed: {', '.join(allowed)}")


def parse(text: str | OptimSpec, **fields: Any) -> OptimSpec:
    """The spec that a string means; ``str(spec)`` is the inverse.

    Args:
        text: ``RULE[-FORMAT[.FORMAT]][(FALLBACK[-FORMAT])][+MASTER][@PLACEMENT][/PARTITION]``, another
            tool's name for the same (in any case), or an :class:`OptimSpec`.
        fields: Fields of :class:`OptimSpec`. Beside a string, those that it leaves to their defaults; to an OptimSpec
            ``hyper``, ``rules`` and ``options`` are added, and others replace its own.

    Returns:
        The :class:`OptimSpec`.

    Raises:
        SpecError: for text that cannot be read, a value that does not exist, a combination that means nothing, and a
            field given twice.

    >>> str(parse("adamw-8bit@paged/zero1"))
    'adamw-8bit@paged/zero1'
    >>> str(parse("paged_adamw_8bit"))
    'adamw-8bit@paged'
    """
    if isinstance(text, OptimSpec):
        kinds = ("hyper", "rules", "options")
        added = {name: {**getattr(text, name), **fields[name]} for name in kinds if name in fields}
        return text.replace(**fields | added) if fields else text
    if not isinstance(text, str):
        raise SpecError(f"a spec is a string or an OptimSpec, not {type(text).__name__}")
    lowered = text.strip().lower()
    # An alias names a rule, a format or a placement; a partition may follow it.
    head, slash, tail = lowered.partition("/")
    head, fallback = _without_fallback(head)
    match = _GRAMMAR.fullmatch(_plain_name(head) + slash + tail)
    if match is None:
        raise SpecError(
            f"cannot read the spec {text!r}; the form is RULE[-FORMAT[.FORMAT]][(FALLBACK)][+MASTER][@PLACEMENT]"
            f"[/PARTITION], where RULE is one of {', '.join(RULES)}"
        )
    axes: dict[str, Any] = {axis: value for axis, value in match.groupdict().items() if value is not None}
    if fallback:
        axes["fallback"] = fallback
    for axis in axes.keys() & fields.keys():
        raise SpecError(f"{axis}={fields[axis]!r} is given beside {text!r}, which says {axis} {axes[axis]!r} already")
    return OptimSpec(**axes, **fields)


def _without_fallback(head: str) -> tuple[str, str]:
    """``muon-8bit(adamw)@host`` as ``muon-8bit@host`` and ``adamw``; the brackets may stand before the format too."""
    match = _FALLBACK.fullmatch(head)
    if match is None or match[1] in WRAPPERS:
        return head, ""
    return f"{match[1]}{match[2]}{match[4]}", match[3]


def _plain_name(head: str) -> str:
    """Names of other tools as ours, inside a wrapper too; what follows the rule stands behind the wrapper."""
    wrapped = _WRAPPED.fullmatch(head)
    if wrapped is None:
        return ALIASES.get(head, head)
    inner = _plain_name(wrapped[2])
    rule = re.match(r"[a-z0-9]*", inner)[0]  # type: ignore[index]
    return f"{wrapped[1]}({rule}){inner[len(rule) :]}{wrapped[3]}"


def lookahead(inner: str | OptimSpec = "adamw", steps: int = 5, rate: float = 0.5) -> OptimSpec:
    """The spec ``inner`` with slow weights that move by ``rate`` of the way to the fast ones every ``steps`` steps, and
    to which the fast ones then return (Zhang et al. 2019). The slow weights are state: in the ledger and in the price.

    Args:
        inner: The spec to wrap, without its own Lookahead.
        steps: Steps of the inner rule between two updates of the slow weights, >= 1.
        rate: Share of the way to the fast weights, in (0, 1].

    Returns:
        The :class:`OptimSpec` ``lookahead(RULE)…``, which can be written as a string too.

    Raises:
        SpecError: for a spec or a number that is not allowed.

    >>> lookahead("adamw-8bit@paged")
    OptimSpec('lookahead(adamw)-8bit@paged', hyper={'lookahead_steps': 5, 'lookahead_rate': 0.5})
    """
    spec = parse(inner)
    hyper = {**spec.hyper, "lookahead_steps": steps, "lookahead_rate": rate}
    return spec.replace(rule=f"lookahead({spec.rule})", hyper=hyper)


def specs(engine: str = "native", *, pairs: bool = False) -> tuple[OptimSpec, ...]:
    """Every valid combination of the axes, rules without a wrapper.

    Args:
        engine: The engine that is to run it, ``"native"`` or ``"bitsandbytes"``.
        pairs: Whether those with a format for each kind of moment are listed too, behind the others.

    Returns:
        :class:`OptimSpec` objects, in the order of the axes.

    Raises:
        KeyError: for no engine of this name.

    >>> len(specs()) > 1000, str(specs()[0]), parse("adamw-8bit.factored") in specs(pairs=True)
    (True, 'adamw', True)
    """
    plain = [*_plain_specs(engine, FORMATS), *(pairs_of(engine) if pairs else ())]
    return tuple(_with_endings(plain))


def pairs_of(engine: str = "native") -> tuple[OptimSpec, ...]:
    """Every rule with a format for each kind of moment, the other axes being the plain default."""
    every = [f"{signed}.{other}" for signed, other in product(FORMATS, FORMATS)]
    return tuple(_plain_specs(engine, [text for text in every if _one_spelling(text) == text]))


def _plain_specs(engine: str, formats: Iterable[str]) -> Iterator[OptimSpec]:
    for rule, fmt in product(RULES, [*formats]):
        with suppress(SpecError):
            yield OptimSpec(rule=rule, format=fmt, engine=engine)


def _with_endings(plain: Iterable[OptimSpec]) -> Iterator[OptimSpec]:
    for spec, (master, placement, partition) in product(plain, [*product(MASTERS, PLACEMENTS, PARTITIONS)]):
        with suppress(SpecError):
            yield spec.replace(master=master, placement=placement, partition=partition)
