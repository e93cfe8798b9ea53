"""Values that refer to each other, as a pickle makes them: how much they are, written out."""

from __future__ import annotations

from typing import Any

from memopt.untrusted import Refused

#: Levels of values in each other; checkpoints have up to about ten.
MAX_DEPTH = 64
#: The graph, written out, per byte of the pickle: values that several share (a shape, a pair of betas) count each time.
MAX_GROWTH = 16
#: Characters of a text that count as one value more.
_TEXT = 64


class Inert:
    """What an object of a class carries, and nothing that it does."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


_CONTAINERS = (dict, list, tuple, set, frozenset, Inert)


def refuse_growth(value: Any, nbytes: int) -> None:
    """Raise :class:`Refused` for a graph that holds itself, is deeper than :data:`MAX_DEPTH`, or has more values,
    written out in full, than :data:`MAX_GROWTH` for each of the ``nbytes`` that it was made of: whatever walks through
    the rest comes to an end."""
    most = MAX_GROWTH * nbytes + 1000
    sizes: dict[int, tuple[int, int]] = {}  # of containers: values in them, and levels
    begun: set[int] = set()
    todo = [(value, False, 0)]
    while todo:
        one, children_known, above = todo.pop()
        if id(one) in sizes or not isinstance(one, _CONTAINERS):
            continue
        children = _children(one)
        if children_known:
            size, levels = 1, 0
            for child in children:
                if isinstance(child, _CONTAINERS):
                    values, below = sizes[id(child)]
                    size, levels = size + values, max(levels, below)
                else:
                    size += 1 + (len(child) // _TEXT if isinstance(child, (str, bytes)) else 0)
            if levels >= MAX_DEPTH or size > most:
                raise Refused(f"it unfolds to {size:,} values on {levels + 1} levels")
            sizes[id(one)] = size, levels + 1
        elif id(one) in begun:
            raise Refused("it holds itself")
        elif above >= MAX_DEPTH:
            raise Refused(f"it has more than {MAX_DEPTH} levels")
        else:
            begun.add(id(one))
            todo.append((one, True, above))
            todo += [(c, False, above + 1) for c in children if isinstance(c, _CONTAINERS) and id(c) not in sizes]


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, Inert):
        return list(value.__dict__.values())
    return list(value)
