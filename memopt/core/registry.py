"""The axes of the spec: names, and the file that defines each value, imported when it is asked for.

The calculator has to answer at once, and a spec needs one value of each axis. Places are strings: this file imports no
axis, and so a spec, which is made of names, knows none either.
"""

# No ``from __future__ import annotations`` here: it is of no use, and modules that an estimate loads go without it.

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
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


_WRAPPED = re.compile(r"([a-z0-9]+)\(([a-z0-9]+)\)")


class Rules(Axis[V]):
    """Iterating gives the plain rules; looking up also finds ``WRAPPER(RULE)``, made when it is asked for."""

    __slots__ = ("wrappers",)

    def __init__(self, package: str, plain: dict[str, str], wrappers: Mapping[str, Callable[[V], V]]) -> None:
        super().__init__(package, plain)
        self.wrappers = wrappers

    def _parts(self, name: object) -> tuple[str, str] | None:
        match = _WRAPPED.fullmatch(name) if isinstance(name, str) else None
        wraps = match is not None and match[1] in self.wrappers and match[2] in self._places
        return (match[1], match[2]) if match is not None and wraps else None

    def __contains__(self, name: object) -> bool:
        return name in self._places or self._parts(name) is not None

    def __getitem__(self, name: str) -> V:
        parts = None if name in self._made else self._parts(name)
        if parts is not None:
            self._made[name] = self.wrappers[parts[0]](self[parts[1]])
        return super().__getitem__(name)


def _called(kind: Callable[[], Any]) -> Any:
    return kind()


#: One object of a class, also where it is on two axes.
_once = cache(_called)

_FORMATS = {
    "32bit": "fp32.FP32",
    "bf16": "bf16.BF16",
    "8bit": "int8.Int8",
    "fp8": "fp8.FP8",
    "4bit": "int4.Int4",
    "factored": "factored.Factored",
}
#: The name of a rule is that of its file.
_RULES = (
    "adamw",
    "adam",
    "adafactor",
    "came",
    "lion",
    "sgd",
    "rmsprop",
    "radam",
    "adabound",
    "lamb",
    "ademamix",
    "adammini",
    "stableadamw",
    "muon",
    "sinkgd",
    "prodigy",
    "scale",
    "apollo",
)
#: Rules that a rule has beside it, in its file.
_BESIDE = {"apollomini": "apollo.MINI", "scale_head": "scale.HEAD", "scale_embedding": "scale.EMBEDDING"}

WRAPPERS: Axis[Any] = Axis("memopt.rules", {"lookahead": "lookahead.wrap"})
RULES: Axis[Any] = Rules("memopt.rules", {**{name: f"{name}.RULE" for name in _RULES}, **_BESIDE}, WRAPPERS)
FORMATS: Axis[Any] = Axis("memopt.formats", dict(_FORMATS), _once)
#: Every format that may hold a moment: the axis, and those that only a rule can ask for (``Moment.fixed_format``).
ALL_FORMATS: Axis[Any] = Axis(
    "memopt.formats",
    {**_FORMATS, "rowmean": "rowmean.RowMean", "sliced": "sliced.Sliced", "permatrix": "permatrix.PerMatrix"},
    _once,
)
MASTERS: Axis[Any] = Axis(
    "memopt.masters",
    {
        "none": "rounded.Rounded",
        "fp32": "fp32.FP32Copy",
        "kahan": "kahan.Kahan",
        "stochastic": "stochastic.Stochastic",
        "split": "split.Split",
        "split16": "split.Split16",
    },
    _called,
)
PLACEMENTS: Axis[Any] = Axis(
    "memopt.placements",
    {"device": "device.Device", "paged": "paged.Paged", "host": "host.Host", "cpu": "cpu.Cpu", "disk": "disk.Disk"},
    _called,
)
PARTITIONS: Axis[Any] = Axis(
    "memopt.partitions",
    {"none": "replicated.Replicated", "zero1": "zero1.Zero1", "zero2": "zero2.Zero2", "zero3": "zero3.Zero3"},
)
ENGINES: Axis[Any] = Axis(
    "memopt.engines", {"native": "native.Native", "bitsandbytes": "bitsandbytes.BitsAndBytes"}, _called
)


def by_sign(fmt: str) -> tuple[str, str]:
    """The formats of signed and of non-negative moments that a spec names: ``FORMAT``, or ``SIGNED.NONNEGATIVE``.

    >>> by_sign("8bit"), by_sign("8bit.factored")
    (('8bit', '8bit'), ('8bit', 'factored'))
    """
    signed, _, non_negative = fmt.partition(".")
    return signed, non_negative or signed


#: axis -> the mappings in which a value of it stands.
_AXES: dict[str, tuple[Axis[Any], ...]] = {
    "rule": (RULES,),
    "format": (FORMATS, ALL_FORMATS),
    "master": (MASTERS,),
    "placement": (PLACEMENTS,),
    "partition": (PARTITIONS,),
    "engine": (ENGINES,),
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
    for one in reversed(_AXES[axis]):  # the larger one first, in which a name may be taken
        one.add(name, place)
