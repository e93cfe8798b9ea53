"""The spec of an optimizer of which some parameters have been converted to another format or place, others not."""

from __future__ import annotations

import re
from collections.abc import Iterable

from memopt.spec import OptimSpec
from memopt.spec.placement_options import OPTIONS


def exactly(name: str) -> str:
    """The pattern of an override that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def mixture(old: OptimSpec, new: OptimSpec, done: Iterable[str], names: Iterable[str]) -> OptimSpec:
    """``old`` with overrides that say of the parameters ``done`` what ``new`` says of them; ``names`` are all.

    >>> from memopt.spec import parse
    >>> dict(mixture(parse("adamw"), parse("adamw-8bit"), ["a[0]"], ["a[0]", "b"]).overrides)
    {'a[[]0]': '8bit@device'}
    """
    overrides = {}
    done, left = set(done), [name for name in names if name not in set(done)]
    for name in sorted(done):
        fmt, placement, _ = new.for_parameter(name)
        if (fmt, placement) != old.for_parameter(name)[:2]:
            overrides[exactly(name)] = f"{fmt}@{placement}"
        else:
            left.append(name)
    used = {old.for_parameter(name)[2] for name in left}
    found = old.replace(options={}, overrides={**overrides, **{k: v for k, v in old.overrides.items() if k in used}})
    options = {**old.options, **new.options}
    return found.replace(options={k: v for k, v in options.items() if found.placements & set(OPTIONS[k].placements)})
