"""Plain Python values as JSON and back: what schedulers and param groups hold, and nothing that executes.

What JSON has not is an object with one key that begins with ``$``: ``{"$tuple": [0.9, 0.999]}``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import isfinite
from typing import Any

import torch

from memopt.checkpoint.tensorfile import DTYPES
from memopt.untrusted import Refused
from memopt.untrusted.pickle_machine import is_key
from memopt.untrusted.text import printable, shown

#: Elements up to which a tensor may stand in the manifest.
MAX_NUMEL = 64


def encode(value: Any, where: str) -> Any:
    """A JSON value; raises ValueError with ``where`` for a value of another kind."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list):
        return [encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": encode(list(value), where)}
    if type(value) is dict and all(isinstance(k, str) and not k.startswith("$") for k in value):
        return {k: encode(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, dict) and all(map(is_key, value)):
        pairs = [[encode(k, where), encode(v, f"{where}[{k!r}]")] for k, v in value.items()]
        return {"$counter" if isinstance(value, Counter) else "$dict": pairs}
    if isinstance(value, torch.Tensor) and value.numel() <= MAX_NUMEL:
        dtype = str(value.dtype).removeprefix("torch.")
        numbers = value.detach().cpu().double() if value.is_floating_point() else value.detach().cpu()
        return {"$tensor": [dtype, list(value.shape), [encode(x, where) for x in numbers.reshape(-1).tolist()]]}
    raise ValueError(
        f"{where} is a {type(value).__name__}, which has no plain form; a checkpoint holds numbers, "
        "strings, lists, tuples, dicts and small tensors"
    )


def decode(value: Any) -> Any:
    """The inverse of :func:`encode`. Raises ValueError for what it would not have written."""
    try:
        return _decode(value)
    except Refused:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError, OverflowError) as error:
        raise Refused(f"a value that cannot be: {printable(str(error), 100)}") from None


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if not any(k.startswith("$") for k in value):
        return {k: _decode(v) for k, v in value.items()}
    ((kind, content),) = value.items()
    if kind not in _DECODERS:
        raise Refused(f"unknown kind of value {shown(kind)}")
    return _DECODERS[kind](content)


def _float(content: Any) -> float:
    if content not in ("nan", "inf", "-inf"):
        raise Refused(f"{shown(content)} is not nan, inf or -inf")
    return float(content)


def _pairs(content: Any) -> dict[Any, Any]:
    return {_key(_decode(key)): _decode(v) for key, v in content}


def _key(key: Any) -> Any:
    """What :func:`encode` has for a key."""
    if not is_key(key):
        raise Refused(f"{shown(key)} as a key")
    return key


def _tensor(content: Any) -> torch.Tensor:
    dtype, shape, numbers = content
    if dtype not in DTYPES.values():
        raise Refused(f"unknown dtype {shown(dtype)}")
    if not isinstance(numbers, list) or len(numbers) > MAX_NUMEL:
        raise Refused(f"a tensor of {shown(numbers)}")
    return torch.tensor(_decode(numbers), dtype=getattr(torch, dtype)).view(shape)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": _float,
    "$tuple": lambda content: tuple(_decode(content)),
    "$dict": _pairs,
    "$counter": lambda content: Counter(_pairs(content)),
    "$tensor": _tensor,
}
