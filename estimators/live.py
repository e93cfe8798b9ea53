"""A torch.nn.Module, on any device or on none."""

from __future__ import annotations

from math import prod
from typing import Any

from estimators.fields import InputError
from estimators.model import Model


def from_module(module: Any) -> Model:
    """Shapes and dtypes of the parameters, shared ones once (told by identity, so also on the meta device); parameters
    that do not require gradients are frozen. Buffers are counted beside them. A transformers module that is
    what its configuration says, and of which every parameter trains, brings the configuration for its activations."""
    shapes, dtypes, frozen = [], {}, set()
    for name, p in module.named_parameters():
        shapes.append((name, tuple(p.shape)))
        dtypes[name] = str(p.dtype).removeprefix("torch.")
        if not p.requires_grad:
            frozen.add(name)
    if not shapes:
        raise InputError(f"{type(module).__name__} has no parameters")
    buffers = sum(prod(b.shape) * b.element_size() for b in module.buffers())
    config = None if frozen else _config(module, dict(shapes))
    return Model(type(module).__name__, tuple(shapes), "exact", frozenset(frozen), dtypes, buffers, config=config)


def _config(module: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The module's own configuration, where it describes exactly these parameters: another head, adapters or a change
    by hand would have other activations."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if to_dict else None
    if not isinstance(config, dict):
        return None
    from estimators.config import from_config

    try:
        described = dict(from_config(config, type(module).__name__).shapes)
    except InputError:
        return None
    return config if described == shapes else None
