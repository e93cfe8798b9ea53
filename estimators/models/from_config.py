"""A Hugging Face configuration as exact shapes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from estimators.errors import MAX_PARAMETERS, InputError, shown
from estimators.models.config_fields import Fields
from estimators.models.families import FAMILIES, FROZEN, buffers, builder
from estimators.models.model import Model

#: Text models whose weights are named and shaped the same when they stand inside a multi-modal one are not taken out
#: of it: the rest of that model needs memory too.
_COMPOSITE = ("text_config", "vision_config", "audio_config", "encoder", "decoder")


def from_config(config: Mapping[str, Any], source: str) -> Model:
    """The parameters of the model that transformers builds from this configuration for training: with the head of its
    language-model (or masked-language-model, image-classification) class. Raises :class:`InputError`."""
    fields = Fields(config, source)
    model_type = fields.text("model_type", "")
    if model_type not in FAMILIES:
        raise InputError(_unknown(config, source, model_type))
    shapes = tuple(builder(model_type)(fields))
    parameters = sum(prod(shape) for _, shape in shapes)
    if parameters > MAX_PARAMETERS:
        raise InputError(f"{source} describes more than 1000T (10^15) parameters, which is not allowed")
    return Model(
        source,
        shapes,
        "exact",
        frozen=FROZEN.get(model_type, frozenset()),
        notes=_notes(config),
        config=config,
        buffers=buffers(model_type, fields),
    )


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("quantization_config"):
        return ("quantization_config is not applied: weights are priced in the dtype asked for",)
    return ()


def _unknown(config: Mapping[str, Any], source: str, model_type: str) -> str:
    nested = [name for name in _COMPOSITE if isinstance(config.get(name), dict)]
    if not model_type:
        return f"{source} has no model_type; it must be one of {', '.join(FAMILIES)}"
    if nested:
        return (
            f"{source}: model_type={shown(model_type)} holds several models ({', '.join(nested)}), which is not "
            "supported; pass the torch.nn.Module instead"
        )
    from difflib import get_close_matches

    near = get_close_matches(model_type[:40], FAMILIES, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{source}: model_type={shown(model_type)} is not known{guess}; known: {', '.join(FAMILIES)}"
