"""A model of any type that transformers can build: its module, without weights, from the configuration.

Names and shapes are remembered in a file by a hash of the configuration and of what it was built with, so that a second
estimate imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any

from estimators.errors import MAX_PARAMETERS, InputError
from estimators.models.model import Model

#: Changes when the remembered file means something else.
FORMAT = 2
#: Bytes of the longest file that is read back: a model has some hundred thousand names at most.
_LONGEST = 2**26


def from_transformers(config: Mapping[str, Any], source: str, head: str = "") -> Model:
    """The model of the class that the configuration names in ``architectures``, else of the class that transformers
    trains this type with. ``head``: the name of another class. Raises :class:`InputError`."""
    found = _remembered(config, head)
    if found is None:
        from estimators.traced.build import described

        found = described(config, source, head)
        _remember(config, head, found)
    shapes = tuple((name, tuple(shape)) for name, shape in found["shapes"])
    if sum(prod(shape) for _, shape in shapes) > MAX_PARAMETERS:
        raise InputError(f"{source} describes more than 1000T (10^15) parameters, which is not allowed")
    return Model(
        source,
        shapes,
        "exact",
        frozen=frozenset(found["frozen"]),
        buffers=found["buffers"],
        notes=(f"counted as transformers' {found['class']}",),
        config=config,
        head=found["class"],
    )


def missing() -> str:
    """What to install, where transformers is not there; else empty."""
    try:
        version("transformers")
    except PackageNotFoundError:
        return "pip install transformers"
    return ""


def _path(config: Mapping[str, Any], head: str) -> str:
    from memopt.kernels.build import cache_root

    with_ = [FORMAT, head, *(version(name) for name in ("transformers", "torch"))]
    text = json.dumps([with_, config], sort_keys=True, default=str)
    return os.path.join(cache_root(), "models", f"{sha256(text.encode()).hexdigest()}.json")


def _remembered(config: Mapping[str, Any], head: str) -> dict[str, Any] | None:
    """What was found before, unless the file is not there or is not whole."""
    try:
        path = _path(config, head)
        if os.path.getsize(path) > _LONGEST:
            return None
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        return found if _whole(found) else None
    except (OSError, ValueError, PackageNotFoundError, RecursionError):
        return None


def _whole(found: Any) -> bool:
    if not isinstance(found, dict) or set(found) != {"shapes", "frozen", "buffers", "class"}:
        return False
    shapes, frozen = found["shapes"], found["frozen"]
    return (
        isinstance(shapes, list)
        and bool(shapes)
        and all(isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) for one in shapes)
        and all(isinstance(s, list) and all(type(n) is int and n >= 0 for n in s) for _, s in shapes)
        and isinstance(frozen, list)
        and all(isinstance(name, str) for name in frozen)
        and type(found["buffers"]) is int
        and isinstance(found["class"], str)
    )


def _remember(config: Mapping[str, Any], head: str, found: dict[str, Any]) -> None:
    """A cache that cannot be written is not one that is needed."""
    try:
        path = _path(config, head)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        beside = f"{path}.{os.getpid()}"
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(found, file)
        os.replace(beside, path)
    except (OSError, ValueError, PackageNotFoundError):
        return
