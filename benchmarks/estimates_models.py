"""Small models of every family, adapted and checkpointed, for ``estimates_activations.py`` and its like."""

from __future__ import annotations

from typing import Any

import torch

_SMALL = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "max_position_embeddings": 512,
}
_LARGE = {**_SMALL, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 2048, "num_hidden_layers": 4}
_GPT = {"n_head": 8, "n_positions": 512, "attn_pdrop": 0.0}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_local_experts": 8}
_MLA = {
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_group": 1,
    "topk_group": 1,
}
_BERT = {"attention_probs_dropout_prob": 0.0}
_VIT = {"image_size": 64, "patch_size": 8, "id2label": {str(i): str(i) for i in range(10)}}

#: name -> what is added to the two sizes. Attention's dropout is off: with it the CPU computes attention otherwise
#: than a GPU does. Every other dropout is as the configuration class has it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"head_dim": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24},
    "gemma": {"head_dim": 24},
    "gemma2": {"head_dim": 24},
    "gemma3_text": {"head_dim": 24},
    "phi3": {},
    "phi": {},
    "glm4": {"head_dim": 16},
    "cohere": {},
    "olmo": {},
    "olmo2": {},
    "smollm3": {},
    "starcoder2": {},
    "gpt_neox": {},
    "gpt2": _GPT,
    "opt": {"attention_dropout": 0.0},
    "bert": _BERT,
    "bloom": {},
    "distilbert": {"attention_dropout": 0.0},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt_bigcode": _GPT,
    "gpt_oss": {**_MOE, "head_dim": 24},
    "gptj": {**_GPT, "rotary_dim": 8},
    "deepseek_v2": _MLA,
    "deepseek_v3": {**_MLA, "first_k_dense_replace": 1},
    "roberta": _BERT,
    "t5": {"feed_forward_proj": "gated-gelu"},
    "vit": _VIT,
    "whisper": {"max_source_positions": 96, "max_target_positions": 512, "num_mel_bins": 20},
    "mixtral": _MOE,
    "olmoe": _MOE,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 160},
    "qwen3_moe": _MOE,
}
#: Families that are measured with adapters too.
ADAPTED = (
    "llama",
    "qwen3",
    "gemma",
    "phi3",
    "mistral",
    "gpt_neox",
    "phi",
    "bert",
    "starcoder2",
    "falcon",
    "whisper",
    "t5",
)
#: (configuration, sequences, tokens of each)
SIZES = ((_SMALL, 4, 64), (_LARGE, 2, 256))
#: Families whose modules compute attention in one way only.
ONLY_EAGER = ("gemma2", "bloom", "gptj", "gpt_oss")


def config(family: str, size: dict[str, Any]) -> dict[str, Any]:
    """A configuration of one family at one size, under the family's own names."""
    base = {"model_type": family, **size, **FAMILIES[family]}
    if family in ("gpt2", "gpt_bigcode", "gptj"):
        base |= {"n_embd": size["hidden_size"], "n_layer": size["num_hidden_layers"]}
        return {k: v for k, v in base.items() if k not in _SMALL or k == "vocab_size"}
    if family == "distilbert":
        base |= {
            "dim": size["hidden_size"],
            "hidden_dim": size["intermediate_size"],
            "n_layers": size["num_hidden_layers"],
            "n_heads": size["num_attention_heads"],
        }
        return {k: v for k, v in base.items() if k not in _SMALL or k in ("vocab_size", "max_position_embeddings")}
    if family == "bloom":
        base |= {"n_layer": size["num_hidden_layers"], "n_head": size["num_attention_heads"]}
        return {k: v for k, v in base.items() if k not in _SMALL or k in ("vocab_size", "hidden_size")}
    if family == "opt":
        base |= {"ffn_dim": size["intermediate_size"], "word_embed_proj_dim": size["hidden_size"]}
    if family == "whisper":
        width, ffn, layers, heads, vocab, pad = (
            size[k]
            for k in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "vocab_size",
                "pad_token_id",
            )
        )
        sides = {
            f"{side}_{k}": v
            for side in ("encoder", "decoder")
            for k, v in (("layers", layers), ("attention_heads", heads), ("ffn_dim", ffn))
        }
        return {
            "model_type": family,
            "d_model": width,
            "vocab_size": vocab,
            "pad_token_id": pad,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            **sides,
            **FAMILIES[family],
        }
    if family == "t5":
        width, heads = size["hidden_size"], size["num_attention_heads"]
        return {
            "model_type": family,
            "d_model": width,
            "d_ff": size["intermediate_size"],
            "num_heads": heads,
            "num_layers": size["num_hidden_layers"],
            "d_kv": width // heads,
            "vocab_size": size["vocab_size"],
            "decoder_start_token_id": 0,
            **FAMILIES[family],
        }
    if family in ("gpt_neox", "bert", "roberta", "vit", "opt", "falcon"):
        base.pop("num_key_value_heads")
    return base


#: What selective checkpointing keeps: results of matrix products and of fused attention.
_ATEN = torch.ops.aten
PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN._grouped_mm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}


class Selective:
    """``context_fn`` of torch.utils.checkpoint, which notes what its contexts keep: no hook sees that."""

    def __init__(self) -> None:
        self.stores: list[Any] = []

    def __call__(self) -> Any:
        from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

        def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

        first, second = create_selective_checkpoint_contexts(policy)
        self.stores.append(first.storage)
        return first, second

    def kept(self) -> list[torch.Tensor]:
        from torch.utils._pytree import tree_leaves

        entries = [entry for store in self.stores for calls in store.values() for entry in calls.values()]
        found = [getattr(leaf, "val", None) for entry in entries for leaf in tree_leaves(entry)]
        return [t for t in found if isinstance(t, torch.Tensor)]


def checkpoint(model: Any, how: str) -> Selective:
    """``full``, ``selective`` or ``every-K``, as transformers and torch do them."""
    selective = Selective()
    arguments = {"use_reentrant": False, **({"context_fn": selective} if how == "selective" else {})}
    every = int(how.removeprefix("every-")) if how.startswith("every-") else 1
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments, every_n_layers=every)
    return selective


def build(cfg: dict[str, Any], dtype: torch.dtype, attention: str, rank: int = 0) -> Any:
    import transformers

    auto = {
        "bert": transformers.AutoModelForMaskedLM,
        "roberta": transformers.AutoModelForMaskedLM,
        "distilbert": transformers.AutoModelForMaskedLM,
        "vit": transformers.AutoModelForImageClassification,
        "whisper": transformers.AutoModelForSpeechSeq2Seq,
        "t5": transformers.AutoModelForSeq2SeqLM,
    }
    made = transformers.AutoConfig.for_model(**cfg)
    made.use_cache = False
    model = auto.get(cfg["model_type"], transformers.AutoModelForCausalLM).from_config(
        made, dtype=dtype, attn_implementation=attention
    )
    if rank:
        adapt(model, rank)
    return model.train()


class Adapted(torch.nn.Module):
    """A frozen linear layer and an fp32 adapter, computed as PEFT's LoraLayer does without dropout."""

    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Linear(base.in_features, rank, bias=False, dtype=torch.float32)
        self.b = torch.nn.Linear(rank, base.out_features, bias=False, dtype=torch.float32)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base(x)
        return (result + self.b(self.a(x.to(self.a.weight.dtype))) * 2.0).to(result.dtype)


def adapt(model: Any, rank: int) -> None:
    from estimators.models.lora import adapted

    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and adapted(f"{name}.weight", tuple(module.weight.shape)):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapted(module, rank))


def inputs(cfg: dict[str, Any], batch: int, seq: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if cfg["model_type"] == "vit":
        side = cfg["image_size"]
        return {"pixel_values": torch.randn(batch, 3, side, side, dtype=dtype), "labels": torch.arange(batch)}
    ids = torch.randint(3, cfg["vocab_size"], (batch, seq))
    if cfg["model_type"] == "whisper":
        heard = torch.randn(batch, cfg["num_mel_bins"], 2 * cfg["max_source_positions"], dtype=dtype)
        return {"input_features": heard, "labels": ids}
    return {"input_ids": ids, "labels": ids}
