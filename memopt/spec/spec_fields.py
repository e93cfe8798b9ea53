"""The fields of a spec: a record with a value on every axis, which cannot be changed, and its text."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from memopt.rules import RULES
from memopt.spec.values import plain

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
Spec = TypeVar("Spec", bound="SpecFields")


class SpecFields:
    """What :class:`memopt.OptimSpec` is made of; that says what the fields are and checks them."""

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
        if not isinstance(other, SpecFields):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in FIELDS)

    def replace(self: Spec, **changes: Any) -> Spec:
        """The same spec with other values of some fields.

        Args:
            changes: field of :class:`memopt.OptimSpec` -> its value.

        Raises:
            SpecError: for a value that does not exist, or that means nothing beside the others.

        >>> import memopt
        >>> memopt.parse("adamw-8bit").replace(placement="paged")
        OptimSpec('adamw-8bit@paged')
        """
        return type(self)(**{**{name: getattr(self, name) for name in FIELDS}, **changes})

    def _validate(self) -> None:
        """Raise SpecError for values that do not exist or mean nothing together."""
        raise NotImplementedError

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
        return _rebuild, (type(self), {k: plain(v) for k, v in fields.items()})


def _rebuild(kind: type[SpecFields], fields: dict[str, Any]) -> SpecFields:
    return kind(**fields)
