"""Layers of a module that are alike, and the module with a few of them in place of all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from estimators.traced.segments import Period

#: Layers that must be saved for a stack to be run with fewer.
WORTH = 4
#: The longest pattern of kinds of layers that is looked for.
MOST_KINDS = 12
#: Parts of the names of a layer's attributes that say where it stands, not what it does.
_PLACES = ("idx", "index", "layer_id", "layer_num", "depth", "block_id")


class Stack(NamedTuple):
    """A list of layers at ``name``, of which the first ``kept`` are run; ``period`` says what stands for the rest."""

    name: str
    layers: torch.nn.ModuleList | torch.nn.Sequential
    kept: int
    period: Period


def stacks(module: torch.nn.Module) -> list[Stack]:
    """Lists of at least a few layers more than have to be run, none inside of another."""
    found: list[Stack] = []
    for name, one in module.named_modules():
        if any(name.startswith(f"{s.name}.") for s in found) or not isinstance(
            one, (torch.nn.ModuleList, torch.nn.Sequential)
        ):
            continue
        stack = _stack(name, one, len(found))
        if stack is not None and not _told_by_number(module, stack):
            found.append(stack)
    return found


def _stack(name: str, layers: Any, at: int) -> Stack | None:
    n = len(layers)
    if n < 3 + WORTH:
        return None
    kinds = [_kind(layer) for layer in layers]
    for p in range(1, MOST_KINDS + 1):
        first = max((i + 1 for i in range(n - p) if kinds[i] != kinds[i + p]), default=0)
        start = first or p  # the first layer may differ from the others by what it is given
        kept = start + 2 * p + ((n - first) % p or p)
        if n - kept >= WORTH:
            return Stack(name, layers, kept, Period(at, start, p, (n - kept) // p))
    return None


def _kind(layer: torch.nn.Module) -> tuple[Any, ...]:
    """What a layer does, as far as its parameters and plain attributes say."""
    found: list[Any] = []
    for name, one in layer.named_modules():
        found.append((name, type(one)))
        for key, t in (*one._parameters.items(), *one._buffers.items()):
            if t is not None:
                found.append((key, tuple(t.shape), t.dtype, t.requires_grad))
        for key, value in sorted(vars(one).items()):
            if key.startswith("_") or any(part in key for part in _PLACES):
                continue
            if isinstance(value, float):
                found.append((key, value == 0))
            elif isinstance(value, (bool, int, str, tuple)) or value is None:
                found.append((key, value))
    return tuple(found)


def _told_by_number(module: torch.nn.Module, stack: Stack) -> bool:
    """Whether the configuration names layers of those that would be left out, or that are the same by chance: such a
    model is run whole."""
    config = getattr(module, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return to_dict is not None and _names(to_dict(), stack.period.first, len(stack.layers))


def _names(values: Any, low: int, high: int, key: str = "") -> bool:
    if isinstance(values, dict):
        return any(_names(v, low, high, str(k)) for k, v in values.items() if not str(k).startswith("id2label"))
    if isinstance(values, (list, tuple)):
        ints = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
        listed = len(ints) == len(values) and any(low <= v < high for v in ints) and len(ints) < high
        return listed or any(_names(v, low, high, key) for v in values if isinstance(v, (dict, list)))
    number = isinstance(values, int) and not isinstance(values, bool) and low <= values < high
    return number and ("layer_i" in key or "index" in key or key.endswith(("_layer", "_idx")))


@contextmanager
def shallow(found: list[Stack]) -> Iterator[list[list[torch.nn.Module]]]:
    """The stacks with the layers that are run, which are given."""
    before = [dict(s.layers._modules) for s in found]
    try:
        for s in found:
            for key in list(s.layers._modules)[s.kept :]:
                del s.layers._modules[key]
        yield [list(s.layers) for s in found]
    finally:
        for s, modules in zip(found, before, strict=True):
            s.layers._modules.clear()
            s.layers._modules.update(modules)
