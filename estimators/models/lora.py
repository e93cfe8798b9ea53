"""LoRA and QLoRA: which weights get an adapter, how the others are stored, and what is left to train."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from estimators.errors import InputError, shown
from estimators.models.model import Model, Shape

#: Storage of quantised weights, bytes per element. bitsandbytes' 4 bits: half a byte and an fp32 scale per 64 elements;
#: with double quantisation an 8-bit scale per 64 and an fp32 scale per 256 of those (QLoRA, section 3). Its 8 bits: a
#: byte (and an fp32 scale per row, which is not counted). GPTQ: half a byte, and per group of 128 an fp16 scale and a
#: 4-bit zero.
NF4 = {
    "nf4": 0.5 + 4 / 64,
    "nf4-double": 0.5 + 1 / 64 + 4 / (64 * 256),
    "int8": 1.0,
    "gptq": 0.5 + 2 / 128 + 0.5 / 128,
}
#: Those that ``prepare_model_for_kbit_training`` turns everything else to fp32 for (it leaves GPTQ's alone).
KBIT = ("nf4", "nf4-double", "int8")

#: PEFT's default targets by model_type (peft/utils/constants.py of 0.21, LoRA).
_QV, _QUERY = ("q_proj", "v_proj"), ("query", "value")
DEFAULT_TARGETS = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "opt", "gptj", "gemma", "gemma2", "gemma3_text"), _QV),
    **dict.fromkeys(("qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _QUERY),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "t5": ("q", "v"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
}

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
#: Parts of the names of matrices that are tables, not linear layers.
_TABLES = ("embed", "wte", "wpe", "shared.weight", "relative_attention_bias")


class Adapters(NamedTuple):
    """``targets``: ``all-linear``, ``attention``, ``default`` (PEFT's, of the family) or names of modules, separated by
    commas. ``quantised``: storage of the linear layers (:data:`NF4`) or empty. ``kbit``: the model was prepared by
    ``prepare_model_for_kbit_training``. ``modules_to_save``: modules of which a copy trains."""

    rank: int
    targets: str = "all-linear"
    dtype: str = "float32"
    dora: bool = False
    modules_to_save: str = ""
    quantised: str = ""
    kbit: bool = False


def adapted(name: str, shape: Shape) -> bool:
    """Whether PEFT's ``target_modules="all-linear"`` would adapt it: a matrix of a linear layer in a layer. The same
    are what quantisation takes."""
    return len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in _LEFT_OUT)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.replace(",", " ").split() if part)


def _named(name: str, wanted: Iterable[str]) -> bool:
    """PEFT's match: the module's path is the name, or ends with it."""
    path = f".{name.removesuffix('.weight')}"
    return any(path.endswith(f".{one}") for one in wanted)


def targets(model: Model, wanted: str) -> list[tuple[str, Shape]]:
    """The weights that get an adapter. Raises :class:`InputError` where there are none."""
    linear = [(n, s) for n, s in model.shapes if adapted(n, s)]
    if not linear:
        raise InputError(f"{model.name} has no linear layers that adapters could be put on")
    if wanted == "all-linear":
        return linear
    if wanted == "attention":
        found = [(n, s) for n, s in linear if "attn" in n.lower() or "attention" in n.lower()]
        if not found:
            raise InputError(f"{model.name} has no layer whose name says attention; name the layers in lora_targets")
        return found
    names = _names(wanted)
    if wanted == "default":
        family = str((model.config or {}).get("model_type"))
        if family not in DEFAULT_TARGETS:
            raise InputError(f"PEFT has no default targets for {family}; name the layers in lora_targets")
        names = DEFAULT_TARGETS[family]
    if not names:
        raise InputError("lora_targets names no layers; it is all-linear, attention, default or names such as q_proj")
    able = [(n, s) for n, s in model.shapes if len(s) == 2 and n.endswith(".weight") and not _is_table(n)]
    for one in names:
        if not any(_named(n, (one,)) for n, _ in able):
            there = ", ".join(sorted({n.removesuffix(".weight").rpartition(".")[2] for n, _ in linear})[:16])
            raise InputError(f"lora_targets: {model.name} has no linear layer {shown(one)} of its own; it has {there}")
    return [(n, s) for n, s in able if _named(n, names)]


def _is_table(name: str) -> bool:
    return any(part in name for part in _TABLES)


def with_adapters(model: Model, rank: int, quantised: str = "", adapters: "Adapters | None" = None) -> Model:
    """Every weight frozen; beside each adapted one A of [rank, in] and B of [out, rank], as PEFT makes them.
    ``quantised`` is the storage of the linear layers: ``nf4``, ``nf4-double``, ``int8``, ``gptq`` or empty."""
    a = adapters or Adapters(rank, quantised=quantised)
    model.known("adapters need the shapes of the linear layers")
    chosen = targets(model, a.targets)
    shapes, dtypes, frozen = list(model.shapes), dict(model.dtypes), {name for name, _ in model.shapes}
    for name, shape in model.shapes:
        if a.quantised and adapted(name, shape):
            dtypes[name] = a.quantised
        elif a.kbit and dtypes.get(name, "bfloat16") in ("bfloat16", "float16"):
            dtypes[name] = "float32"
    # transformers' Conv1D stores [in, out].
    turned = any(name.endswith("attn.c_attn.weight") and shape[0] < shape[1] for name, shape in chosen)
    for name, shape in chosen:
        rows, cols = reversed(shape) if turned else shape
        stem = name.removesuffix(".weight")
        made: list[tuple[str, Shape]] = [
            ("lora_A.default.weight", (a.rank, cols)),
            ("lora_B.default.weight", (rows, a.rank)),
        ]
        if a.dora:
            made.append(("lora_magnitude_vector.default.weight", (rows,)))
        for part, adapter in made:
            shapes.append((f"{stem}.{part}", adapter))
            dtypes[shapes[-1][0]] = a.dtype
    for one in _names(a.modules_to_save):
        saved = [(n, s) for n, s in model.shapes if _named(n.removesuffix(".bias"), (one,))]
        if not saved:
            raise InputError(
                f"modules_to_save: {model.name} has no module {shown(one)} of its own (a head that shares the "
                "embedding's weight goes by the embedding's name)"
            )
        for name, shape in saved:
            stem, _, part = name.rpartition(".")
            shapes.append((f"{stem}.modules_to_save.default.{part}", shape))
            dtypes[shapes[-1][0]] = dtypes.get(name, "bfloat16")
    return model._replace(shapes=tuple(shapes), frozen=frozenset(frozen), dtypes=dtypes)


def largest_quantised(model: Model) -> int:
    """Elements of the largest quantised matrix: it is decoded whole before it is multiplied."""
    return max((prod(shape) for name, shape in model.shapes if model.dtypes.get(name) in NF4), default=0)
