"""Decided before anything is changed: what feeds each moment, and which hyperparameters go along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memopt.checkpoint.conversion.mean_of import meaning
from memopt.core.hyperparameters import CHECKS, SpecError
from memopt.rules import RULES
from memopt.spec import SHARED, OptimSpec, parse

#: ``fill``: what a moment is made of, whether it was kept or not: a number for every element, or a moment's name.
#: ``{"step": 0}`` begins counting anew, and with it the bias correction.
Fill = Mapping[str, Any]


def check_fill(fill: Fill, rule: str) -> None:
    """Raise SpecError for a value that no moment can have."""
    for name, value in fill.items():
        number = CHECKS["dampening"][1](value)
        if not (number or isinstance(value, str)) or (name == "step" and not (number and value >= 0)):
            raise SpecError(
                f"fill[{name!r}] = {value!r} is not allowed for {rule}; it is a finite number, or the name "
                "of a moment that was kept (step: a number >= 0)"
            )


def feeds(old: str, new: str, name: str, have: Mapping[str, Any], wanted: str, fill: Fill) -> str | float:
    """The name of the stored moment that becomes ``wanted``, or the number that fills it.

    ``have`` are the moments stored for the parameter ``name``; ``old`` and ``new`` are rules. Raises SpecError for a
    moment that is missing or means something else, unless ``fill`` says what to take.
    """
    chosen = fill.get(wanted)
    if isinstance(chosen, str):
        if chosen not in have:
            raise SpecError(
                f"{name}: fill[{wanted!r}] = {chosen!r}, but what was kept is {', '.join(have) or 'nothing'}"
            )
        return chosen
    if chosen is not None:
        return float(chosen)
    if wanted in have and meaning(old, wanted) == meaning(new, wanted):
        return wanted
    reason = f"{old} does not keep it"
    if wanted in have:
        reason = f"in {old} it is {meaning(old, wanted)}, in {new} {meaning(new, wanted)}"
    raise SpecError(
        f"{name}: {new} needs {wanted!r} and {reason}; say how to fill it, for example fill={{{wanted!r}: 0}}"
    )


def unused_fill(fill: Fill, moments: set[str]) -> None:
    """Raise SpecError for a fill that names a moment the new rule does not keep."""
    unknown = [name for name in fill if name not in moments and name != "step"]
    if unknown:
        raise SpecError(f"fill has {unknown[0]!r}, which is not kept; the moments are {', '.join(sorted(moments))}")


#: Hyperparameters that every rule has and a schedule drives: they stay whatever the rule.
ALWAYS_CARRIED = ("lr", "weight_decay")


def carried(old: str, new: str, h: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of ``old`` that go along to ``new``: all within a rule, else those of the same default (one
    that differs is tuned for its own rule: b2 is 0.999 in AdamW and 0.99 in Lion), rate and decay in any case."""
    theirs, ours = RULES[old].hyperparameters, RULES[new].hyperparameters
    same = {k for k in theirs if k in ours and (old == new or theirs[k] == ours[k] or k in ALWAYS_CARRIED)}
    return {k: h[k] for k in theirs if k in h and k in same}


def target_spec(now: OptimSpec, spec: str | OptimSpec, fields: Mapping[str, Any]) -> OptimSpec:
    """The spec asked for. Of a string, what it and ``fields`` do not say stays: engine, overrides, hyperparameters,
    and options of placements that are still in use."""
    from memopt.pricing.price import spec_fields
    from memopt.spec.placement_options import OPTIONS

    given = spec_fields(fields)
    if isinstance(spec, OptimSpec):
        return parse(spec, **given)
    wanted = parse(spec)
    before = now.hyper if wanted.rule not in now.rules else {**now.hyper, **now.rules[wanted.rule]}
    hyper = {**carried(now.rule, wanted.rule, before), **given.pop("hyper", {})}
    options = given.pop("options", {})
    rules = given.pop("rules", {})
    wanted = wanted.replace(**{"engine": now.engine, "overrides": now.overrides, **given, "hyper": hyper})
    for rule in wanted.rule_names[1:]:
        own = {**now.rules.get(rule, {}), **rules.pop(rule, {})}
        wanted = wanted.replace(rules={**wanted.rules, **({rule: own} if own else {})})
    if rules:
        wanted = wanted.replace(rules=rules)  # which says what there is
    in_use = {k: v for k, v in now.options.items() if wanted.placements & set(OPTIONS[k].placements)}
    return wanted.replace(options={**in_use, **options})


def target_hyper(
    old: OptimSpec, new: OptimSpec, h: Mapping[str, Any], rule: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The full hyperparameters of a group under the new spec, where it is of ``rule``; ``given`` wins over what the
    group
    had, of the rule that it is given for. Raises SpecError for values the new spec refuses."""
    own = RULES[rule].hyperparameters
    said = dict(given) if rule == new.rule else {k: given[k] for k in SHARED if k in given and k in own}
    changed = {k: v for k, v in new.rules.get(rule, {}).items() if old.rules.get(rule, {}).get(k) != v}
    found = new.resolve({**carried(old.rule_of(h), rule, h), **said, **changed}, rule=rule)
    return {**found, **({"rule": rule} if new.is_mixed else {})}
