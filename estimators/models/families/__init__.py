"""One shape builder per family: ``builder(fields)`` yields ``(name, shape)`` of every parameter, shared ones once,
under the names of transformers' own module for that ``model_type``.

A family's module is imported when a model of it is priced.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from estimators.models.config_fields import Fields

#: ``model_type`` -> the module here that has a builder of that name.
FAMILIES = {
    "bert": "bert",
    "bloom": "gpt",
    "cohere": "llama",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "distilbert": "bert",
    "falcon": "falcon",
    "gemma": "llama",
    "gemma2": "llama",
    "gemma3_text": "llama",
    "glm4": "llama",
    "gpt2": "gpt",
    "gpt_bigcode": "gpt",
    "gpt_neox": "gpt",
    "gpt_oss": "gpt_oss",
    "gptj": "gpt",
    "granite": "llama",
    "llama": "llama",
    "ministral3": "llama",
    "mistral": "llama",
    "mixtral": "moe",
    "olmo": "llama",
    "olmo2": "llama",
    "olmo3": "llama",
    "olmoe": "moe",
    "opt": "gpt",
    "phi": "gpt",
    "phi3": "llama",
    "qwen2": "llama",
    "qwen2_moe": "moe",
    "qwen3": "llama",
    "qwen3_moe": "moe",
    "roberta": "bert",
    "smollm3": "llama",
    "starcoder2": "gpt",
    "t5": "t5",
    "vit": "vit",
    "whisper": "whisper",
    "xlm-roberta": "bert",
}

#: Parameters that do not train: they need weights, but neither gradients nor state.
FROZEN = {"whisper": frozenset({"model.encoder.embed_positions.weight"})}


#: Families with buffers worth counting -> the function beside the builder that says how many bytes they have.
BUFFERS = {"gpt_bigcode": "gpt_bigcode_buffers"}


def buffers(model_type: str, fields: Fields) -> int:
    """Bytes of the buffers that every model of the family has."""
    if model_type not in BUFFERS:
        return 0
    module = import_module(f"estimators.models.families.{FAMILIES[model_type]}")
    return int(getattr(module, BUFFERS[model_type])(fields))


def builder(model_type: str) -> Callable[[Fields], Any]:
    module = import_module(f"estimators.models.families.{FAMILIES[model_type]}")
    family: Callable[[Fields], Any] = getattr(module, model_type.replace("-", "_"))
    return family
