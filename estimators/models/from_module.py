"""A torch.nn.Module, on any device or on none, also one that PEFT has wrapped."""

from __future__ import annotations

import re
from math import prod
from typing import Any

from estimators.errors import InputError
from estimators.models.model import Model, Shape

#: PEFT's names beside a module's own.
_PREFIX = "base_model.model."
_ADAPTER = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector|modules_to_save)\.([^.]+)\b")
#: bitsandbytes' classes of parameters -> storage
_STORAGE = {"Params4bit": "nf4", "Int8Params": "int8"}


def from_module(module: Any, inputs: Any = None) -> Model:
    """Shapes and dtypes of the parameters, shared ones once (told by identity, so also on the meta device); parameters
    that do not require gradients are frozen. Buffers are counted beside them. A transformers module that is what its
    configuration says, adapters of PEFT aside, brings the configuration for its activations; those of another follow
    from a traced step, with ``inputs`` or with such as its configuration describes."""
    shapes: list[tuple[str, Shape]] = []
    dtypes: dict[str, str] = {}
    frozen = set()
    for given, p in module.named_parameters():
        name = _own_name(given)
        dtypes[name], shape = _stored(p)
        shapes.append((name, shape))
        if not p.requires_grad:
            frozen.add(name)
    if not shapes:
        raise InputError(f"{type(module).__name__} has no parameters")
    buffers = sum(prod(b.shape) * b.element_size() for b in module.buffers())
    config = _config(module, {name: shape for name, shape in shapes if not _ADAPTER.search(name)})
    traced = module if inputs is not None or config is None else None
    return Model(
        type(module).__name__,
        tuple(shapes),
        "exact",
        frozenset(frozen),
        dtypes,
        buffers,
        config=config,
        module=traced,
        inputs=inputs,
    )


def _own_name(name: str) -> str:
    """The name in the module that PEFT wrapped, and its adapter's as ``default``."""
    if not name.startswith(_PREFIX):
        return name
    name = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
    return _ADAPTER.sub(r".\1.default", name)


def _stored(p: Any) -> tuple[str, Shape]:
    """dtype and shape; of a quantised parameter its storage, and the shape that it stands for."""
    kind = type(p).__name__
    state = getattr(p, "quant_state", None)
    if kind == "Params4bit" and state is not None:
        return "nf4-double" if state.nested else "nf4", tuple(state.shape)
    if kind == "Params4bit" and not str(p.dtype).endswith("int8"):
        return "nf4", tuple(p.shape)  # quantised when it is moved to a card
    return _STORAGE.get(kind, str(p.dtype).removeprefix("torch.")), tuple(p.shape)


def _config(module: Any, shapes: dict[str, Shape]) -> dict[str, Any] | None:
    """The module's own configuration, where it describes exactly these parameters and there is a formula for them:
    another head or a change by hand would have other activations."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if to_dict else None
    if not isinstance(config, dict):
        return None
    from estimators.models.from_config import from_config

    try:
        described = from_config(config, type(module).__name__)
    except InputError:
        return None
    return config if not described.head and dict(described.shapes) == shapes else None
