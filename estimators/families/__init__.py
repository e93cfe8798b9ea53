"""One shape builder per family: ``builder(fields)`` yields ``(name, shape)`` of every parameter, shared ones once,
under the names of transformers' own module for that ``model_type``.

A family's module is imported when a model of it is priced.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from estimators.fields import Fields

#: ``model_type`` -> the module here that has a builder of that name.
FAMILIES = {
    "bert": "bert",
    "bloom": "bloom",
    "cohere": "cohere",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "distilbert": "distilbert",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt2",
    "gpt_neox": "gpt_neox",
    "gpt_oss": "gpt_oss",
    "gptj": "gptj",
    "granite": "llama",
    "llama": "llama",
    "ministral3": "llama",
    "mistral": "llama",
    "mixtral": "mixtral",
    "olmo": "olmo",
    "olmo2": "olmo",
    "olmo3": "olmo",
    "olmoe": "olmo",
    "opt": "opt",
    "phi": "phi",
    "phi3": "phi",
    "qwen2": "qwen",
    "qwen2_moe": "qwen_moe",
    "qwen3": "qwen",
    "qwen3_moe": "qwen_moe",
    "roberta": "bert",
    "smollm3": "llama",
    "starcoder2": "starcoder2",
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
    module = import_module(f"estimators.families.{FAMILIES[model_type]}")
    return int(getattr(module, BUFFERS[model_type])(fields))


def builder(model_type: str) -> Callable[[Fields], Any]:
    module = import_module(f"estimators.families.{FAMILIES[model_type]}")
    family: Callable[[Fields], Any] = getattr(module, model_type.replace("-", "_"))
    return family
