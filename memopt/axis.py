"""An axis of the spec as a mapping: names, and the file that defines each value, imported when it is asked for.

The calculator has to answer at once, and a spec needs one value of each axis.
"""

# No ``from __future__ import annotations`` here: it is of no use, and modules that an estimate loads go without it.

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, TypeVar

V = TypeVar("V")


class Axis(Mapping[str, V]):
    """``places`` maps a name to ``module.attribute`` in ``package``, or to ``module:attribute`` anywhere; ``make``
    turns the attribute into the value."""

    __slots__ = ("_made", "_make", "_package", "_places")

    def __init__(self, package: str, places: dict[str, str], make: Callable[[Any], V] = lambda value: value) -> None:
        self._package = package
        self._places = places
        self._make = make
        self._made: dict[str, V] = {}

    def __getitem__(self, name: str) -> V:
        if name not in self._made:
            place = self._places[name]
            if ":" not in place:
                place = f"{self._package}.{place.replace('.', ':')}"
            module, _, attribute = place.partition(":")
            self._made[name] = self._make(getattr(import_module(module), attribute))
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, name: str, place: str) -> None:
        """A value of another package: ``place`` is ``module:attribute``. Raises ValueError for a name that is taken."""
        if name in self._places:
            raise ValueError(f"{name!r} is taken: it is {self._places[name]} of {self._package}")
        self._places[name] = place


#: axis -> (module, attributes) where the values stand.
_AXES = {
    "rule": ("memopt.rules", ("RULES",)),
    "format": ("memopt.formats", ("FORMATS", "HELD")),
    "master": ("memopt.masters", ("MASTERS",)),
    "placement": ("memopt.placements", ("PLACEMENTS",)),
    "partition": ("memopt.partitions", ("PARTITIONS",)),
    "engine": ("memopt.engines", ("ENGINES",)),
}


def register(axis: str, name: str, place: str) -> None:
    """A value of another package on an axis of the spec, before the first spec that uses it.

    Args:
        axis: ``"rule"``, ``"format"``, ``"master"``, ``"placement"``, ``"partition"`` or ``"engine"``.
        name: Its name in a spec: lower-case letters and digits.
        place: ``module:attribute`` of the ``Rule``, or of the class of another axis. It is imported at its first use.

    Raises:
        ValueError: for an unknown axis, a name that a spec cannot hold or that is taken, and a place that is not
            of this form.

    >>> register("rule", "adamw", "my_package.rules:MINE")
    Traceback (most recent call last):
    ValueError: 'adamw' is taken: it is adamw.RULE of memopt.rules
    """
    if axis not in _AXES:
        raise ValueError(f"unknown axis {axis!r}; allowed: {', '.join(_AXES)}")
    if not (isinstance(name, str) and name.isascii() and name.isalnum() and name == name.lower()):
        raise ValueError(f"{axis} {name!r} is not allowed; a name is lower-case letters and digits")
    if axis == "rule" and not name[0].isalpha():
        raise ValueError(f"rule {name!r} is not allowed; the name of a rule begins with a letter")
    module, _, attribute = place.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ValueError(f"{place!r} is not allowed; the place of a value is 'module:attribute'")
    home, names = _AXES[axis]
    for one in reversed(names):  # the larger one first, in which a name may be taken
        getattr(import_module(home), one).add(name, place)
