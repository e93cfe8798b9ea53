"""Pickles as trees of plain values, read by a machine that has nothing to execute.

Python's own unpickler reserves what a pickle asks for before it looks how much there is (a memo of 2**29 places, a
string of 2**40 bytes), calls whatever is named, and builds a graph whose text or hash is exponentially longer than the
pickle. torch's ``weights_only`` unpickler does the last, too, and can be made to reserve (``bytearray(10**11)``). Here

- a name stands for what a table of the caller says, else it is refused; nothing is imported or looked up;
- only those entries of the table are called, and they take and return plain values;
- keys are texts and small numbers, whose hashes nobody can make collide;
- every step takes at least one byte of the pickle, and the graph, written out in full, is a small multiple of it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from memopt.untrusted import Refused
from memopt.untrusted.graphs import Inert, refuse_growth
from memopt.untrusted.pickle_machine import Machine, Names
from memopt.untrusted.text import printable

#: Classes that are made for the names of one pickle.
MAX_CLASSES = 64


def nothing_outside(pid: Any) -> Any:
    raise Refused("it refers to something outside")


def read_pickle(content: bytes, names: Names, origin: str, outside: Callable[[Any], Any] = nothing_outside) -> Any:
    """The value of a pickle. ``names(module, name)`` gives what a name stands for, and raises :class:`Refused` for one
    that it does not know; ``outside(pid)`` what a persistent id does.

    Raises :class:`Refused` with ``origin`` for a pickle that is damaged, names anything else, or unfolds.
    """
    try:
        value = Machine(content, names, outside).run()
        refuse_growth(value, len(content))
        return value
    except Refused as error:
        reason = str(error)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, struct.error) as error:
        reason = f"{type(error).__name__}: {printable(str(error), 100)}"
    raise Refused(
        f"{printable(origin)} cannot be read without executing what it says, or is damaged: {reason}"
    ) from None


def inert_classes(modules: tuple[str, ...], real: Mapping[str, Any]) -> Names:
    """A table of names: ``known`` by ``module.name``; any other of ``modules`` is a class of this reading alone, so
    that nothing that a file says of a class outlives it."""
    classes: dict[str, Any] = {}

    def names(module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in real:
            return real[full]
        if full in classes or (module in modules and name.isidentifier() and len(classes) < MAX_CLASSES):
            return classes.setdefault(full, type(name, (Inert,), {}))
        raise Refused(f"it names {printable(full, 100)}")

    return names
