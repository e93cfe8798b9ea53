"""Layers that attend to a window of the last tokens: they are called with a mask of their own, which a fused kernel
too is given as soon as a sequence is longer than the window. Source: transformers' configuration and modeling file of
each ``model_type``, and masking_utils.py, ``_ignore_causal_mask_sdpa``."""

from __future__ import annotations

from collections.abc import Callable

from estimators.activations.blocks import causal_mask
from estimators.activations.chain import Layer, Mask, Network
from estimators.activations.op import Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields

SLIDING = "sliding_attention"


def _every(f: Fields, i: int) -> bool:
    return True


def _asked(f: Fields, i: int) -> bool:
    return f.flag("use_sliding_window", False)


def _from_on(f: Fields, i: int) -> bool:
    return _asked(f, i) and i >= f.layers("max_window_layers", 28)


def _every_second(f: Fields, i: int) -> bool:
    return i % 2 == 0


def _below(f: Fields, i: int) -> bool:
    return _asked(f, i) and i % 2 == 0 and i < f.layers("max_window_layers", 28)


def _but_every_fourth(f: Fields, i: int) -> bool:
    return (i + 1) % 4 != 0


def _but_every_sixth(f: Fields, i: int) -> bool:
    return (i + 1) % f.integer("sliding_window_pattern", 6) != 0


#: ``model_type`` -> its window where the configuration names none, and which layers have it where that names no types.
_ONE_MASK: dict[str, tuple[int | None, Callable[[Fields, int], bool]]] = {
    "ministral3": (None, _every),
    "mistral": (4096, _every),
    "mixtral": (None, _every),
    "phi3": (None, _every),
    "qwen3_moe": (4096, _asked),
    "starcoder2": (None, _every),
}
#: The same, of those that make a mask for either type of layer, with which kind of layer they have both.
_TWO_MASKS: dict[str, tuple[int | None, Callable[[Fields, int], bool]]] = {
    "gemma2": (4096, _every_second),
    "gemma3_text": (4096, _but_every_sixth),
    "gpt_oss": (128, _every_second),
    "olmo3": (4096, _but_every_fourth),
    "qwen2": (4096, _from_on),
    "qwen2_moe": (4096, _below),
    "qwen3": (4096, _from_on),
}
#: Of those, the ones that make both whether any layer has a window or not.
_ALWAYS_BOTH = frozenset({"gemma2", "gemma3_text", "gpt_oss", "olmo3", "qwen2_moe"})


def windowed(network: Network, f: Fields, model_type: str, step: Step) -> Network:
    """``network`` with the masks of its windows. Parts of a sequence that ranks share (``cp``) have none."""
    known = _ONE_MASK.get(model_type) or _TWO_MASKS.get(model_type)
    if not known or step.cp > 1:
        return network
    window, has = f.optional("sliding_window", known[0]), known[1]
    count = len(network.layers)
    types = f.texts("layer_types", count) if model_type in _TWO_MASKS else ()
    inside = tuple(bool(window) and (types[i] == SLIDING if types else has(f, i)) for i in range(count))
    longer = bool(window) and step.seq >= (window or 0)
    full = Mask(causal_mask(step), tuple(i for i in range(count) if not inside[i]))
    own = Mask(causal_mask(step, masked=longer), tuple(i for i in range(count) if inside[i]))
    both = model_type in _ALWAYS_BOTH
    masks = (full,) * (both or not all(inside) or model_type in _TWO_MASKS) + (own,) * (both or any(inside))
    layers = tuple(
        (f"windowed {kind}", _masked(layer)) if longer and within else (kind, layer)
        for (kind, layer), within in zip(network.layers, inside, strict=True)
    )
    return network._replace(layers=layers, masks=tuple(m for m in masks if m.nbytes))


def _masked(layer: Layer) -> Layer:
    """The layer where attention is given a mask."""

    def run(t: Tape, x: Tensor) -> Tensor:
        t.masked = True
        return layer(t, x)

    return run
