"""``OptimSpec``: a value on every axis, validated when it is made.

RULE[-FORMAT][+MASTER][@PLACEMENT][/PARTITION]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product
from types import MappingProxyType
from typing import Any

from memopt.core.hyperparameters import SpecError
from memopt.core.param_names import clean_pattern
from memopt.core.registry import ENGINES, FORMATS, MASTERS, PARTITIONS, PLACEMENTS
from memopt.rules import RULES, Moment, Rule
from memopt.spec.aliases import ALIASES
from memopt.spec.placement_options import checked

_GRAMMAR = re.compile(
    r"(?P<rule>[a-z][a-z0-9]*(?:\([a-z0-9]+\))?)(?:-(?P<format>[a-z0-9]+))?(?:\+(?P<master>[a-z0-9]+))?"
    r"(?:@(?P<placement>[a-z0-9]+))?(?:/(?P<partition>[a-z0-9]+))?"
)
#: ``lookahead(adamw-8bit)``: what is inside may be a spec, of which the rule alone stays inside.
_WRAPPED = re.compile(r"([a-z0-9]+)\(([^()]*)\)(.*)")
_OVERRIDE = re.compile(r"(?P<format>[a-z0-9]+)?(?:@(?P<placement>[a-z0-9]+))?")


#: The axes, then what is not on one.
FIELDS = ("rule", "format", "master", "placement", "partition", "engine", "overrides", "hyper", "options")


class OptimSpec:
    """A value on the axes *rule*, *format*, *master*, *placement*, *partition* and *engine*.

    ``format=None`` is the rule's default. ``overrides`` maps shell-style patterns over parameter names to
    ``FORMAT``, ``@PLACEMENT`` or ``FORMAT@PLACEMENT``; the first pattern that matches wins, and one that matches
    nothing is an error when the optimizer is built or priced. ``hyper`` are hyperparameters of the rule, ``options``
    what its placements are told (:data:`memopt.spec.placement_options.OPTIONS`).

    Raises :class:`SpecError` for a value that does not exist or a combination that means nothing.

    >>> OptimSpec(rule="adamw", format="8bit", placement="paged")
    OptimSpec('adamw-8bit@paged')
    >>> OptimSpec(rule="lion", format="factored")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    memopt.core.hyperparameters.SpecError: 'lion-factored': no moment of lion has a factored form; nearest: lion, ...
    """

    # Written out rather than a dataclass: importing dataclasses takes longer than all else that an estimate does.
    __slots__ = FIELDS

    rule: str
    format: str
    master: str
    placement: str
    partition: str
    engine: str
    overrides: Mapping[str, str]
    hyper: Mapping[str, Any]
    options: Mapping[str, Any]

    def __init__(
        self,
        *,
        rule: str,
        format: str = "",
        master: str = "none",
        placement: str = "device",
        partition: str = "none",
        engine: str = "native",
        overrides: Mapping[str, str] = MappingProxyType({}),
        hyper: Mapping[str, Any] = MappingProxyType({}),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        values = (rule, format, master, placement, partition, engine, overrides, hyper, options)
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
        set_(self, "format", self.format or rule.default_format)
        for axis, values in (
            ("format", FORMATS),
            ("master", MASTERS),
            ("placement", PLACEMENTS),
            ("partition", PARTITIONS),
            ("engine", ENGINES),
        ):
            _known(axis, getattr(self, axis), values)
        set_(self, "overrides", MappingProxyType(dict(self.overrides)))
        set_(self, "hyper", MappingProxyType(dict(self.hyper)))
        options = checked(self.options, self.placements, self.partition) if self.options else {}
        set_(self, "options", MappingProxyType(options))
        rule.resolve(self.hyper)
        if self.format == "factored" and not any(m.factorable for m in self._all_moments()):
            nearest = f"{self.rule}, {self.rule}-8bit"
            raise SpecError(f"'{self}': no moment of {self.rule} has a factored form; nearest: {nearest}")
        reason = ENGINES[self.engine].refuse(self)
        if reason:
            raise SpecError(f"'{self}' with engine={self.engine!r}: {reason}")
        for pattern in self.overrides:
            self._override(pattern)

    @property
    def placements(self) -> set[str]:
        """The spec's placement and those of its overrides."""
        named = (_OVERRIDE.fullmatch(text) for text in self.overrides.values() if isinstance(text, str))
        return {self.placement, *(match["placement"] for match in named if match and match["placement"])}

    def _all_moments(self) -> tuple[Moment, ...]:
        rule = RULES[self.rule]
        return rule.moments(rule.resolve({**self.hyper, **rule.example}), (2, 2))

    def _override(self, pattern: str) -> tuple[str, str]:
        text = self.overrides[pattern]
        match = _OVERRIDE.fullmatch(text) if isinstance(text, str) and text else None
        if match is None:
            raise SpecError(f"overrides[{pattern!r}] = {text!r} is not FORMAT, @PLACEMENT or FORMAT@PLACEMENT")
        fmt, placement = match["format"] or self.format, match["placement"] or self.placement
        _known("format", fmt, FORMATS)
        _known("placement", placement, PLACEMENTS)
        self.replace(format=fmt, placement=placement, overrides={}, options={})
        return fmt, placement

    def for_parameter(self, name: str) -> tuple[str, str, str | None]:
        """``(format, placement, pattern)`` for a parameter: the first override that matches its name, or the spec's."""
        if self.overrides:
            from fnmatch import fnmatchcase

            for pattern in self.overrides:
                if fnmatchcase(name, pattern):
                    return *self._override(pattern), pattern
        return self.format, self.placement, None

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

    def resolve(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Every hyperparameter of the rule with its value, checked against the formats in use."""
        rule: Rule = RULES[self.rule]
        h = rule.resolve({**self.hyper, **(given or {})})
        self._check_hyper(h)
        return h

    def check_live(self, h: Mapping[str, Any]) -> None:
        """Raise :class:`SpecError` for hyperparameters that a param group was given since it was made and that these
        formats cannot follow. What keeps no state any more, such as SGD whose momentum was switched off, fits all."""
        if RULES[self.rule].moments(h, (2, 2)):
            self._check_hyper(h)

    def _check_hyper(self, h: Mapping[str, Any]) -> None:
        for fmt in {self.format, *(self._override(p)[0] for p in self.overrides)}:
            reason = RULES[self.rule].refuse(h, fmt)
            if reason:
                nearest = self.replace(format="32bit", overrides={}, hyper={}, options={})
                raise SpecError(f"'{self}': {reason}; nearest: {nearest}")
        reason = ENGINES[self.engine].refuse_hyper(self, h)
        if reason:
            raise SpecError(f"'{self}' with engine={self.engine!r}: {reason}")

    def __str__(self) -> str:
        default = RULES[self.rule].default_format if self.rule in RULES else ""
        return (
            self.rule
            + (f"-{self.format}" if self.format != default else "")
            + (f"+{self.master}" if self.master != "none" else "")
            + (f"@{self.placement}" if self.placement != "device" else "")
            + (f"/{self.partition}" if self.partition != "none" else "")
        )

    def __repr__(self) -> str:
        fields = ("overrides", "hyper", "options")
        extra = [f"{k}={dict(getattr(self, k))!r}" for k in fields if getattr(self, k)]
        if self.engine != "native":
            extra.insert(0, f"engine={self.engine!r}")
        return f"OptimSpec({', '.join([repr(str(self)), *extra])})"

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in FIELDS}
        return _rebuild, ({k: dict(v) if isinstance(v, MappingProxyType) else v for k, v in fields.items()},)


def _rebuild(fields: dict[str, Any]) -> OptimSpec:
    return OptimSpec(**fields)


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
        text: ``RULE[-FORMAT][+MASTER][@PLACEMENT][/PARTITION]``, another tool's name for the same (in any case), or
            an :class:`OptimSpec`.
        fields: Fields of :class:`OptimSpec`. Beside a string, those that it leaves to their defaults; to an OptimSpec
            ``hyper`` and ``options`` are added, and others replace its own.

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
        added = {name: {**getattr(text, name), **fields[name]} for name in ("hyper", "options") if name in fields}
        return text.replace(**fields | added) if fields else text
    if not isinstance(text, str):
        raise SpecError(f"a spec is a string or an OptimSpec, not {type(text).__name__}")
    lowered = text.strip().lower()
    # An alias names a rule, a format or a placement; a partition may follow it.
    head, slash, tail = lowered.partition("/")
    match = _GRAMMAR.fullmatch(_plain_name(head) + slash + tail)
    if match is None:
        raise SpecError(
            f"cannot read the spec {text!r}; the form is RULE[-FORMAT][+MASTER][@PLACEMENT][/PARTITION], "
            f"where RULE is one of {', '.join(RULES)}"
        )
    axes: dict[str, Any] = {axis: value for axis, value in match.groupdict().items() if value is not None}
    for axis in axes.keys() & fields.keys():
        raise SpecError(f"{axis}={fields[axis]!r} is given beside {text!r}, which says {axis} {axes[axis]!r} already")
    return OptimSpec(**axes, **fields)


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


def specs(engine: str = "native") -> tuple[OptimSpec, ...]:
    """Every valid combination of the axes, rules without a wrapper.

    Args:
        engine: The engine that is to run it, ``"native"`` or ``"bitsandbytes"``.

    Returns:
        :class:`OptimSpec` objects, in the order of the axes.

    Raises:
        KeyError: for no engine of this name.

    >>> len(specs()) > 1000, str(specs()[0])
    (True, 'adamw')
    """
    return tuple(_specs(engine))


def _specs(engine: str) -> Iterator[OptimSpec]:
    for rule in RULES:
        for fmt, master, placement, partition in product(FORMATS, MASTERS, PLACEMENTS, PARTITIONS):
            try:
                yield OptimSpec(
                    rule=rule, format=fmt, master=master, placement=placement, partition=partition, engine=engine
                )
            except SpecError:
                continue
