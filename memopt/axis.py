"""An axis of the spec as a mapping: names, and the file that defines each value, imported when it is asked for.

The calculator has to answer at once, and a spec needs one value of each axis.
"""

# No ``from __future__ import annotations`` here: it is of no use, and modules that an estimate loads go without it.

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, TypeVar

V = TypeVar("V")


class Axis(Mapping[str, V]):
    """``places`` maps a name to ``module.attribute`` in ``package``; ``make`` turns the attribute into the value."""

    __slots__ = ("_made", "_make", "_package", "_places")

    def __init__(self, package: str, places: dict[str, str], make: Callable[[Any], V] = lambda value: value) -> None:
        self._package = package
        self._places = places
        self._make = make
        self._made: dict[str, V] = {}

    def __getitem__(self, name: str) -> V:
        if name not in self._made:
            module, _, attribute = self._places[name].partition(".")
            self._made[name] = self._make(getattr(import_module(f"{self._package}.{module}"), attribute))
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
