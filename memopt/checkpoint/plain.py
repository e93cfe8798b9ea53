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
    if isinstance(value, dict):
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
    """The inverse of :func:`encode`. Raises ValueError for an object with another key."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if not any(k.startswith("$") for k in value):
        return {k: decode(v) for k, v in value.items()}
    ((kind, content),) = value.items()
    if kind not in _DECODERS:
        raise ValueError(f"unknown kind of value {kind!r}")
    return _DECODERS[kind](content)


def _tensor(content: Any) -> torch.Tensor:
    dtype, shape, numbers = content
    if dtype not in DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}")
    return torch.tensor(decode(numbers), dtype=getattr(torch, dtype)).view(shape)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$tuple": lambda content: tuple(decode(content)),
    "$dict": lambda content: {decode(k): decode(v) for k, v in content},
    "$counter": lambda content: Counter({decode(k): decode(v) for k, v in content}),
    "$tensor": _tensor,
}
