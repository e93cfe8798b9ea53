"""What the values of a spec may be, each by itself: names on an axis, formats and how they are spelled, overrides."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from memopt.core.hyperparameters import SpecError
from memopt.core.registry import FORMATS, by_sign
from memopt.rules import Moment


class Override(NamedTuple):
    """What an override says: ``rule`` and ``format`` are empty where it names none."""

    rule: str
    format: str
    placement: str
    pattern: str


#: Whatever a format says of a signed moment.
SIGNED = Moment("exp_avg")


def one_spelling(fmt: str) -> str:
    """The shortest spelling of a format or of two: a signed moment has no factored form, and is in 32 bits there."""
    signed, _, non_negative = fmt.partition(".")
    if signed == non_negative:
        return signed
    return "factored" if (signed, non_negative) == ("32bit", "factored") else fmt


def known_format(fmt: str) -> str:
    """The shortest spelling of a format or of two, which there must be."""
    for one in by_sign(fmt):
        known("format", one, FORMATS)
    return one_spelling(fmt)


def check_pair(rule: str, fmt: str, moments: tuple[Moment, ...]) -> None:
    """Raise SpecError for two formats where these moments are all of one kind."""
    signed, non_negative = by_sign(fmt)
    kinds = {m.signed for m in moments if not m.held}
    if len(kinds) == 1:
        kind, one = ("signed", signed) if True in kinds else ("non-negative", non_negative)
        raise SpecError(
            f"'{rule}-{fmt}': {rule} has no two kinds of moments to keep in two formats, only {kind} ones; "
            f"nearest: {rule}-{one}"
        )


def known(axis: str, value: Any, allowed: Mapping[str, Any]) -> None:
    if value in allowed:
        return
    from difflib import get_close_matches

    near = get_close_matches(str(value), allowed, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    raise SpecError(f"unknown {axis} {value!r}{guess}; allowed: {', '.join(allowed)}")


def plain(value: Any) -> Any:
    """Without views of dictionaries, which pickle cannot carry."""
    return {k: plain(v) for k, v in value.items()} if isinstance(value, (dict, MappingProxyType)) else value
