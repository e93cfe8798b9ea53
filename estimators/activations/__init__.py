"""Activations: what a forward pass keeps for the backward pass, and how much is alive at each moment of both.

No torch: a family's forward pass is written once with operations that only count (:mod:`~.tape`), and
:mod:`~.simulate` runs it forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from estimators.activations.chain import Network
from estimators.activations.families.windows import windowed
from estimators.activations.phases import Activations, PhaseBytes, composed
from estimators.activations.scope import Parameters
from estimators.activations.scope import parameters as parameters_of
from estimators.activations.step import Step
from estimators.models.config_fields import Fields

__all__ = [
    "ATTENTIONS",
    "EXPERTS",
    "MIXED",
    "OWN",
    "PACKED",
    "SPLIT",
    "WRITTEN",
    "Activations",
    "Network",
    "PhaseBytes",
    "Step",
    "activations",
    "written",
]

#: ``model_type`` -> module here and the name of its function. A family that is not here has no formula, and an
#: estimate says so.
WRITTEN = {
    "cohere": ("llama", "cohere"),
    "gemma": ("llama", "gemma"),
    "gemma2": ("llama", "gemma2"),
    "gemma3_text": ("llama", "gemma3_text"),
    "glm4": ("llama", "glm4"),
    "bert": ("bert", "bert"),
    "bloom": ("gpt", "bloom"),
    "deepseek_v2": ("deepseek", "deepseek_v2"),
    "deepseek_v3": ("deepseek", "deepseek_v3"),
    "distilbert": ("bert", "distilbert"),
    "falcon": ("falcon", "falcon"),
    "gpt_bigcode": ("gpt", "gpt_bigcode"),
    "gpt_oss": ("gpt_oss", "gpt_oss"),
    "gptj": ("gpt", "gptj"),
    "gpt2": ("gpt", "gpt2"),
    "gpt_neox": ("gpt", "gpt_neox"),
    "granite": ("llama", "llama"),
    "llama": ("llama", "llama"),
    "ministral3": ("llama", "ministral3"),
    "mistral": ("llama", "mistral"),
    "mixtral": ("moe", "mixtral"),
    "olmo": ("llama", "olmo"),
    "olmo2": ("llama", "olmo2"),
    "olmo3": ("llama", "olmo2"),
    "olmoe": ("moe", "olmoe"),
    "opt": ("gpt", "opt"),
    "phi": ("gpt", "phi"),
    "phi3": ("llama", "phi3"),
    "qwen2": ("llama", "qwen2"),
    "qwen2_moe": ("moe", "qwen2_moe"),
    "qwen3": ("llama", "qwen3"),
    "qwen3_moe": ("moe", "qwen3_moe"),
    "roberta": ("bert", "bert"),
    "smollm3": ("llama", "smollm3"),
    "starcoder2": ("gpt", "starcoder2"),
    "t5": ("t5", "t5"),
    "vit": ("vit", "vit"),
    "whisper": ("whisper", "whisper"),
    "xlm-roberta": ("bert", "bert"),
}

#: ``model_type`` -> a forward pass that is not one of transformers': whoever writes one down registers it here.
OWN: dict[str, Callable[[Fields, Step], Network]] = {}

#: Families whose formula was checked under torch.autocast: all but DeepSeek, T5 and those with eager attention only.
MIXED = frozenset(WRITTEN) - {"bloom", "deepseek_v2", "deepseek_v3", "gemma2", "gpt_oss", "gptj", "t5"}

#: Families whose formula is one rank's of tensor or context parallelism, and of expert parallelism.
_SPLIT = """cohere gemma gemma3_text glm4 gpt2 granite llama ministral3 mistral mixtral olmo phi3 qwen2 qwen2_moe qwen3
qwen3_moe smollm3"""
SPLIT = frozenset(_SPLIT.split())
#: Families whose formula knows packed sequences.
PACKED = SPLIT - {"gpt2"}
EXPERTS = frozenset({"deepseek_v2", "deepseek_v3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})

#: Families that torch's selective checkpointing does not work on -> why.
NOT_SELECTIVE = {"gpt_oss": "biases are added to results of products in place"}

ATTENTIONS = ("sdpa", "flash", "eager")


def written(model_type: str) -> bool:
    """Whether the family has a formula."""
    return model_type in WRITTEN or model_type in OWN


def activations(
    config: Mapping[str, Any],
    source: str,
    step: Step,
    checkpointing: str = "none",
    parameters: Parameters | None = None,
    part: Callable[[Network, Step], Network] | None = None,
) -> Activations:
    """Of one micro-batch. ``parameters``: their dtypes, which of them train, and their adapters; by default the
    configuration's own, all of which train, or adapters of ``step.rank`` on all linear layers in fp32. ``part``
    makes the network of a stage of a pipeline. Raises KeyError for a family or a nonlinearity without a formula."""
    fields = Fields(config, source)
    network = _forward_pass(config["model_type"])(fields, step)
    network = windowed(network, fields, config["model_type"], step)
    network = part(network, step) if part else network
    return composed(network, step, checkpointing, parameters or _own(config, source, step))


def _forward_pass(model_type: str) -> Callable[[Fields, Step], Network]:
    if model_type in OWN:
        return OWN[model_type]
    module, name = WRITTEN[model_type]
    found: Callable[[Fields, Step], Network] = getattr(import_module(f"estimators.activations.families.{module}"), name)
    return found


def _own(config: Mapping[str, Any], source: str, step: Step) -> Parameters:
    from estimators.models.from_config import from_config
    from estimators.models.lora import with_adapters

    model = from_config(config, source)
    model = with_adapters(model, step.rank) if step.rank else model
    own = "float32" if step.item == 4 or step.mixed else "bfloat16"
    return parameters_of(
        (name, shape, model.dtypes.get(name, own), name not in model.frozen) for name, shape in model.shapes
    )
