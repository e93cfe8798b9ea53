"""What the values of a spec may be, each by itself: names on an axis, formats and how they are spelled."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from memopt.core.hyperparameters import SpecError
from memopt.core.registry import FORMATS, by_sign
from memopt.rules import RULES, Moment, Rule

#: Whatever a format says of a signed moment.
SIGNED = Moment("exp_avg")


def one_spelling(fmt: str) -> str:
    """The shortest spelling of a format or of two: a signed moment has no factored form, and is in 32 bits there."""
    signed, _, non_negative = fmt.partition(".")
    if signed == non_negative:
        return signed
    return "factored" if (signed, non_negative) == ("32bit", "factored") else fmt


def spelled_format(fmt: str) -> str:
    """The shortest spelling of a format or of two, which there must be."""
    for one in by_sign(fmt):
        check_value("format", one, FORMATS)
    return one_spelling(fmt)


def check_pair(rule: str, fmt: str, moments: tuple[Moment, ...]) -> None:
    """Raise SpecError for two formats where these moments are all of one kind."""
    signed, non_negative = by_sign(fmt)
    kinds = {m.signed for m in moments if not m.fixed_format}
    if len(kinds) == 1:
        kind, one = ("signed", signed) if True in kinds else ("non-negative", non_negative)
        raise SpecError(
            f"'{rule}-{fmt}': {rule} has no two kinds of moments to keep in two formats, only {kind} ones; "
            f"nearest: {rule}-{one}"
        )


def _all(rule: Rule) -> tuple[Moment, ...]:
    """The moments of a rule with whatever keeps more of them."""
    every = {**rule.hyperparameters, **rule.example, **dict.fromkeys(rule.moments_by, 0.5)}
    return rule.moments(every, (2, 2))


def check_format(rule: str, fmt: str, spec: str, hyper: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raise SpecError for a format, or two, that the moments of a rule do not have; ``spec`` is what is refused."""
    own = RULES[rule]
    signed, non_negative = by_sign(fmt)
    if non_negative == "factored":
        moments = own.moments(own.resolve({**hyper, **own.example}), (2, 2))
        if not any(m.factorable for m in moments):
            nearest = f"{rule}, {rule}-{'8bit' if signed == 'factored' else signed}"
            raise SpecError(f"'{spec}': no moment of {rule} has a factored form; nearest: {nearest}")
    if signed == non_negative:
        return
    if "." in fmt:
        parts = (own, *(RULES[name] for name in own.companions.values()))
        check_pair(rule, fmt, tuple(m for part in parts for m in _all(part)))
    reason = FORMATS[signed].declines(SIGNED, (4096, 4096))
    if reason:
        raise SpecError(f"'{spec}': {reason}; nearest: {rule}-{one_spelling(f'8bit.{non_negative}')}")


def check_value(axis: str, value: Any, allowed: Mapping[str, Any]) -> None:
    if value in allowed:
        return
    from difflib import get_close_matches

    near = get_close_matches(str(value), allowed, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    names = [name for name in allowed if "_" not in name]  # the others are parts of a rule that is named
    raise SpecError(f"unknown {axis} {value!r}{guess}; allowed: {', '.join(names)}")


def plain(value: Any) -> Any:
    """Without views of dictionaries, which pickle cannot carry."""
    return {k: plain(v) for k, v in value.items()} if isinstance(value, (dict, MappingProxyType)) else value
