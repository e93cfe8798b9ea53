"""Bounds on what is built of a configuration that may come from anybody: a short file must not take minutes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as registration

from estimators.errors import InputError, shown

#: Layers, blocks, stages or experts that one entry may ask for. The deepest published models have some hundreds; Doge
#: has 16,384 experts, which are rows of one matrix.
MAX_REPEATED = 16_384
#: Modules and parameters of one model; NLLB's mixture of 128 experts, each a module, has some 16,000.
MAX_MODULES = 30_000

_REPEATS = ("layer", "block", "depth", "stage", "expert")
#: What makes transformers look elsewhere than into the configuration: at the Hub, or for another package's kernels.
_ELSEWHERE = ("auto_map", "attn_implementation", "attn_implementation_internal", "experts_implementation")


def checked(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What transformers is given of a configuration. Raises :class:`InputError` where it repeats something without
    end."""
    _refuse_endless(config, source)
    given = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    return {k: v for k, v in given.items() if not k.startswith("_") and k not in _ELSEWHERE}


def _refuse_endless(value: Any, source: str, key: str = "") -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _refuse_endless(inner, source, str(name))
    elif isinstance(value, list):
        for inner in value:
            _refuse_endless(inner, source, key)
    elif isinstance(value, (int, float)) and value > MAX_REPEATED and any(part in key.lower() for part in _REPEATS):
        if "size" in key.lower() or key.lower().endswith(("_dim", "_id", "_theta")):
            return
        raise InputError(f"{source}: {shown(key)}={shown(value)} is not allowed; at most {MAX_REPEATED:,} are built")


@contextmanager
def offline() -> Iterator[None]:
    """A configuration that names another model as its part would have it looked up at the Hub."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def counted(source: str) -> Iterator[None]:
    """Stops the building of a model that has too many modules. Raises :class:`InputError`."""
    count = 0

    def one_more(owner: nn.Module, name: str, registered: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise InputError(f"{source} describes more than {MAX_MODULES:,} modules and weights, which is not built")

    hooks = [
        registration.register_module_module_registration_hook(one_more),
        registration.register_module_parameter_registration_hook(one_more),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
