"""Overrides of a spec: what one parameter has instead of what the spec says, by its name."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

from memopt.core.hyperparameters import SpecError
from memopt.core.registry import PLACEMENTS
from memopt.rules import RULES
from memopt.spec.aliases import ALIASES
from memopt.spec.values import check_format, check_value, spelled_format

_OVERRIDE = re.compile(r"(?P<what>[a-z0-9_.-]+(?:\([a-z0-9]+\)[a-z0-9.-]*)?)?(?:@(?P<placement>[a-z0-9]+))?")


class Override(NamedTuple):
    """What an override says: ``rule`` and ``format`` are empty where it names none."""

    rule: str
    format: str
    placement: str
    pattern: str


def parse_override(pattern: str, text: Any, placement: str, rules: tuple[str, str]) -> Override:
    """``text`` in a spec of this placement, and of this rule and fallback. Raises SpecError for what means nothing."""
    match = _OVERRIDE.fullmatch(text) if isinstance(text, str) and text else None
    if match is None:
        raise SpecError(
            f"overrides[{pattern!r}] = {text!r} is not FORMAT, RULE or RULE-FORMAT, with or without @PLACEMENT"
        )
    what, placement = match["what"] or "", match["placement"] or placement
    check_value("placement", placement, PLACEMENTS)
    what = ALIASES.get(what, what)
    if what in RULES or "-" in what:
        return Override(*rule_and_format(what, f"overrides[{pattern!r}] = {text!r}"), placement, pattern)
    if what:
        what = spelled_format(what)
        rule, fallback = rules
        _check_format_of((rule, rule_and_format(fallback, "")[0]) if fallback else (rule,), what)
    return Override("", what, placement, pattern)


def rule_and_format(text: str, what: str) -> tuple[str, str]:
    """``RULE[-FORMAT]``, or another tool's name for it; the format is empty where none is named."""
    text = ALIASES.get(text, text)
    rule, _, fmt = text.partition("-")
    check_value("rule", rule, RULES)
    if fmt:
        fmt = spelled_format(fmt)
        try:
            _check_format_of((rule,), fmt)
        except SpecError as error:
            raise SpecError(f"{what}: {error}") from None
    return rule, fmt


@cache
def _check_format_of(rules: tuple[str, ...], fmt: str) -> None:
    """Raise SpecError for a format that none of these rules has."""
    refused = []
    for rule in rules:
        try:
            check_format(rule, fmt, f"{rule}-{fmt}")
        except SpecError as error:
            refused.append(error)
    if len(refused) == len(rules):
        raise refused[0]
