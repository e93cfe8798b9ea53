"""LoRA and QLoRA: which weights get an adapter, and what is left to train."""

from __future__ import annotations

from math import prod

from estimators.fields import InputError
from estimators.model import Model, Shape

#: 4-bit weights of bitsandbytes, bytes per element: half a byte and an fp32 scale per 64 elements; with double
#: quantisation an 8-bit scale per 64 and an fp32 scale per 256 of those (QLoRA, section 3).
NF4 = {"nf4": 0.5 + 4 / 64, "nf4-double": 0.5 + 1 / 64 + 4 / (64 * 256)}

#: Parts of the names of matrices that are not a linear layer inside a layer of the model, or are not adapted: both
#: ends, and what chooses experts.
_LEFT_OUT = (
    "embed",
    "wte",
    "wpe",
    "lm_head",
    "shared.weight",
    "classifier",
    "cls.",
    "gate.weight",
    "router",
    "shared_expert_gate",
    "relative_attention_bias",
    "proj_out",
    "project_in",
    "project_out",
    "vocab_",
)


def adapted(name: str, shape: Shape) -> bool:
    """Whether PEFT's ``target_modules="all-linear"`` would adapt it: a matrix of a linear layer in a layer."""
    return len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in _LEFT_OUT)


def with_adapters(model: Model, rank: int, quantised: str = "") -> Model:
    """Every weight frozen; beside each adapted one A of [rank, in] and B of [out, rank] in fp32, as PEFT makes them.
    ``quantised`` is the storage of the adapted weights: ``nf4``, ``nf4-double`` or empty."""
    if model.provenance == "assumed":
        raise InputError(
            "adapters need the shapes of the linear layers; a parameter count has none, name an "
            "architecture or a config.json"
        )
    targets = [(name, shape) for name, shape in model.shapes if adapted(name, shape)]
    if not targets:
        raise InputError(f"{model.name} has no linear layers that adapters could be put on")
    # transformers' Conv1D stores [in, out].
    turned = any(name.endswith("attn.c_attn.weight") and shape[0] < shape[1] for name, shape in targets)
    shapes, dtypes = list(model.shapes), dict(model.dtypes)
    for name, shape in targets:
        rows, cols = reversed(shape) if turned else shape
        stem = name.removesuffix(".weight")
        for part, adapter in (("lora_A", (rank, cols)), ("lora_B", (rows, rank))):
            shapes.append((f"{stem}.{part}.default.weight", adapter))
            dtypes[shapes[-1][0]] = "float32"
        if quantised:
            dtypes[name] = quantised
    frozen = frozenset(name for name, _ in model.shapes)
    return model._replace(shapes=tuple(shapes), frozen=frozen, dtypes=dtypes)


def largest_quantised(model: Model) -> int:
    """Elements of the largest 4-bit matrix: it is decoded whole before it is multiplied."""
    return max((prod(shape) for name, shape in model.shapes if model.dtypes.get(name) in NF4), default=0)
