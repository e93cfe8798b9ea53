"""A torch.nn.Module, on any device or on none."""

from __future__ import annotations

from math import prod
from typing import Any

from estimators.fields import InputError
from estimators.model import Model


def from_module(module: Any) -> Model:
    """Shapes and dtypes of the parameters, shared ones once (told by identity, so also on the meta device); parameters
    that do not require gradients are frozen. Buffers are counted beside them. A transformers module brings its
    configuration, from which activations follow as if every parameter trained."""
    shapes, dtypes, frozen = [], {}, set()
    for name, p in module.named_parameters():
        shapes.append((name, tuple(p.shape)))
        dtypes[name] = str(p.dtype).removeprefix("torch.")
        if not p.requires_grad:
            frozen.add(name)
    if not shapes:
        raise InputError(f"{type(module).__name__} has no parameters")
    buffers = sum(prod(b.shape) * b.element_size() for b in module.buffers())
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if to_dict else None
    return Model(type(module).__name__, tuple(shapes), "exact", frozenset(frozen), dtypes, buffers, config=config)
