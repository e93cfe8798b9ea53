"""A Hugging Face configuration as exact shapes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from estimators.errors import MAX_PARAMETERS, InputError, shown
from estimators.models.config_fields import Fields
from estimators.models.families import FAMILIES, FROZEN, buffers, builder
from estimators.models.model import Model

#: Types that are another under a name of their own -> that one, and where their defaults differ.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "camembert": ("xlm-roberta", {}),
    "kimi_k2": ("deepseek_v3", {}),
    "mt5": ("t5", {"feed_forward_proj": "gated-gelu"}),
}


def from_config(config: Mapping[str, Any], source: str) -> Model:
    """The parameters of the model that transformers builds from this configuration for training: with the head of its
    language-model (or masked-language-model, image-classification) class. Raises :class:`InputError`."""
    fields = Fields(config, source)
    model_type = fields.text("model_type", "")
    if model_type in ALIASES:
        model_type, defaults = ALIASES[model_type]
        config = {**defaults, **config, "model_type": model_type}
        fields = Fields(config, source)
    if model_type not in FAMILIES:
        return _built(config, source, model_type)
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


def _built(config: Mapping[str, Any], source: str, model_type: str) -> Model:
    """A type without a family here, as transformers builds it."""
    from estimators.traced.from_transformers import from_transformers, missing

    if not model_type:
        raise InputError(
            f"{source} has no model_type; it says which model this is, such as {', '.join(list(FAMILIES)[:8])}"
        )
    text = config.get("text_config")
    if missing() and isinstance(text, Mapping) and text.get("model_type") in FAMILIES:
        model = from_config(text, source)
        others = sorted(name for name, part in config.items() if name != "text_config" and isinstance(part, Mapping))
        left = f"{', '.join(others) or 'what is beside text_config'} ({missing()})"
        return model._replace(without=(left,))
    if missing():
        raise InputError(_unknown(source, model_type, missing()))
    model = from_transformers(config, source)
    return model._replace(notes=(*_notes(config), *model.notes))


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("quantization_config"):
        return ("quantization_config is not applied: weights are priced in the dtype asked for",)
    return ()


def _unknown(source: str, model_type: str, install: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(model_type[:40], FAMILIES, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"{source}: model_type={shown(model_type)} has no formula here{guess}; transformers builds it where it is "
        f"installed ({install}); known without it: {', '.join(FAMILIES)}"
    )
