"""What stands for the functions that torch's pickles call: each takes values of the file and returns plain ones."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from math import prod
from typing import Any

from torch import Tensor

from memopt.untrusted import Refused
from memopt.untrusted.graphs import Inert
from memopt.untrusted.headers import MAX_DIMENSIONS, MAX_LENGTH
from memopt.untrusted.pickle_machine import Call
from memopt.untrusted.text import shown


class Subclass(Inert):
    """A tensor subclass of another tool: the tensors that it is made of as attributes, and its ``shape``."""

    shape: tuple[int, ...]


def whole(numbers: Any) -> tuple[int, ...] | None:
    """A shape or strides; None for anything else."""
    if not isinstance(numbers, tuple) or len(numbers) > MAX_DIMENSIONS:
        return None
    if not all(type(n) is int and 0 <= n <= MAX_LENGTH for n in numbers):
        return None
    return numbers if prod(n for n in numbers if n) <= MAX_LENGTH else None


def size(numbers: Any = ()) -> tuple[Any, ...]:
    if not isinstance(numbers, (list, tuple)):
        raise Refused(f"a shape that is {shown(numbers)}")
    return tuple(numbers)


def a_tensor(data: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter that is no tensor")
    return data


def no_subclass(*arguments: Any) -> Any:
    raise Refused("a tensor subclass that says nothing of its class")


def subclass(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, or of a class of another tool's: of that what it is made of."""
    if type(rebuild) is not Call or not isinstance(arguments, tuple):
        raise Refused("a tensor that is made of no tensor")
    if rebuild.function is not no_subclass:
        return a_tensor(rebuild.function(*arguments))
    if not (isinstance(kind, type) and issubclass(kind, Subclass)) or not isinstance(state, dict):
        raise Refused(f"a tensor subclass that is {shown(kind)}")
    shape = whole(arguments[2]) if len(arguments) > 2 else None
    if shape is None or not all(isinstance(key, str) and re.fullmatch(r"_?[a-z]\w*", key) for key in state):
        raise Refused("a tensor subclass without a shape")
    found = kind()
    found.__dict__.update({**state, "shape": shape})
    return found


def ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    if items != () and items != []:
        raise Refused("an OrderedDict that is made of items")
    return OrderedDict()


def counter(items: Any = None) -> dict[Any, Any]:
    return Counter(items) if isinstance(items, dict) else Counter()


def plain_set(items: Any = ()) -> set[Any]:
    if not isinstance(items, (list, tuple)) or not all(isinstance(one, (str, int)) for one in items):
        raise Refused("a set of other things than texts and numbers")
    return set(items)


def plain_complex(real: Any, imaginary: Any) -> complex:
    return complex(float(real), float(imaginary))


def latin(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"text in the encoding {shown(encoding)}")
    return text.encode("latin-1")


def plain_bytes(content: Any = b"", encoding: Any = "latin-1") -> bytes:
    return content if isinstance(content, bytes) else latin(content, encoding)
