"""The spec of an optimizer of which some parameters have been converted to another format or place, others not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from memopt.spec import OptimSpec
from memopt.spec.placement_options import OPTIONS


def exactly(name: str) -> str:
    """The pattern of an override that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def mixture(old: OptimSpec, new: OptimSpec, done: Iterable[str], names: Mapping[str, str]) -> OptimSpec:
    """``old`` with overrides that say of the parameters ``done`` what ``new`` says of them; ``names`` are all, each
    with its rule.

    >>> from memopt.spec import parse
    >>> dict(mixture(parse("adamw"), parse("adamw-8bit"), ["a[0]"], {"a[0]": "adamw", "b": "adamw"}).overrides)
    {'a[[]0]': '8bit@device'}
    """
    overrides = {}
    done, left = set(done), [name for name in names if name not in set(done)]
    for name in sorted(done):
        rule = names[name]
        before, now = ((spec.format_for(name, rule), spec.for_parameter(name)[1]) for spec in (old, new))
        if now != before:
            named = f"{rule}-" if old.is_mixed else ""
            overrides[exactly(name)] = f"{named}{now[0]}@{now[1]}"
        else:
            left.append(name)
    used = {old.for_parameter(name)[2] for name in left}
    found = old.replace(options={}, overrides={**overrides, **{k: v for k, v in old.overrides.items() if k in used}})
    options = {**old.options, **new.options}
    return found.replace(options={k: v for k, v in options.items() if found.placements & set(OPTIONS[k].placements)})
