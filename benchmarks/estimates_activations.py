"""Predicted activations and peaks beside those of real training steps on the CPU.

    python benchmarks/estimates_activations.py

For every case a small model is built with transformers, one step warms up, then one forward pass runs under
saved_tensors_hooks (storages counted once) and one whole step runs with every allocation traced: forward, backward,
and an optimizer step of memopt's own. Writes ``benchmarks/results/estimates_activations.json`` and ``.md``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import memopt
from estimators.costs import estimate
from estimators.rows import PHASES
from estimators.trace import saved, traced

SPEC = "adamw-8bit"
RANK = 8

_SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "num_key_value_heads": 2,
          "vocab_size": 512, "num_hidden_layers": 3, "pad_token_id": 0, "max_position_embeddings": 512}  # fmt: skip
_LARGE = {**_SMALL, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 2048, "num_hidden_layers": 4}
_GPT = {"n_head": 8, "n_positions": 512, "attn_pdrop": 0.0}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_local_experts": 8}
_MLA = {"num_key_value_heads": 8, "n_routed_experts": 8, "num_local_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 96, "q_lora_rank": 48, "kv_lora_rank": 32,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24, "n_group": 1, "topk_group": 1}  # fmt: skip
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
    "gptj": {**_GPT, "rotary_dim": 8},
    "deepseek_v2": _MLA,
    "deepseek_v3": {**_MLA, "first_k_dense_replace": 1},
    "roberta": _BERT,
    "vit": _VIT,
    "whisper": {"max_source_positions": 96, "max_target_positions": 512, "num_mel_bins": 20},
    "mixtral": _MOE,
    "olmoe": _MOE,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 160},
    "qwen3_moe": _MOE,
}
#: Families that are measured with adapters too.
ADAPTED = ("llama", "qwen3", "gemma", "phi3", "mistral", "gpt_neox", "phi", "bert", "starcoder2")
#: (configuration, sequences, tokens of each)
SIZES = ((_SMALL, 4, 64), (_LARGE, 2, 256))
#: Families whose modules compute attention in one way only.
ONLY_EAGER = ("gemma2", "bloom", "gptj")


def config(family: str, size: dict[str, Any]) -> dict[str, Any]:
    """A configuration of one family at one size, under the family's own names."""
    base = {"model_type": family, **size, **FAMILIES[family]}
    if family in ("gpt2", "gpt_bigcode", "gptj"):
        base |= {"n_embd": size["hidden_size"], "n_layer": size["num_hidden_layers"]}
        return {k: v for k, v in base.items() if k not in _SMALL or k == "vocab_size"}
    if family == "distilbert":
        base |= {"dim": size["hidden_size"], "hidden_dim": size["intermediate_size"], "n_layers":
                 size["num_hidden_layers"], "n_heads": size["num_attention_heads"]}  # fmt: skip
        return {k: v for k, v in base.items() if k not in _SMALL or k in ("vocab_size", "max_position_embeddings")}
    if family == "bloom":
        base |= {"n_layer": size["num_hidden_layers"], "n_head": size["num_attention_heads"]}
        return {k: v for k, v in base.items() if k not in _SMALL or k in ("vocab_size", "hidden_size")}
    if family == "opt":
        base |= {"ffn_dim": size["intermediate_size"], "word_embed_proj_dim": size["hidden_size"]}
    if family == "whisper":
        width, ffn, layers, heads, vocab, pad = (size[k] for k in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "pad_token_id"))  # fmt: skip
        sides = {f"{side}_{k}": v for side in ("encoder", "decoder")
                 for k, v in (("layers", layers), ("attention_heads", heads), ("ffn_dim", ffn))}  # fmt: skip
        return {"model_type": family, "d_model": width, "vocab_size": vocab, "pad_token_id": pad, "bos_token_id": 1,
                "eos_token_id": 2, "decoder_start_token_id": 1, **sides, **FAMILIES[family]}  # fmt: skip
    if family in ("gpt_neox", "bert", "roberta", "vit", "opt", "falcon"):
        base.pop("num_key_value_heads")
    return base


#: What selective checkpointing keeps: results of matrix products and of fused attention.
_ATEN = torch.ops.aten
PRODUCTS = {
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default, _ATEN._grouped_mm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default, _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default, _ATEN._scaled_dot_product_cudnn_attention.default,
}  # fmt: skip


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

    auto = {"bert": transformers.AutoModelForMaskedLM, "roberta": transformers.AutoModelForMaskedLM,
            "distilbert": transformers.AutoModelForMaskedLM,
            "vit": transformers.AutoModelForImageClassification, "whisper": transformers.AutoModelForSpeechSeq2Seq,
            "t5": transformers.AutoModelForSeq2SeqLM}  # fmt: skip
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base(x)
        return (result + self.b(self.a(x.to(self.a.weight.dtype))) * 2.0).to(result.dtype)


def adapt(model: Any, rank: int) -> None:
    from estimators.lora import adapted

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


def measure(family: str, size: int, dtype: str, attention: str, checkpointing: str, lora: bool,
            mixed: bool = False) -> dict[str, Any]:  # fmt: skip
    """One case: predicted and real bytes. ``mixed``: fp32 weights under torch.autocast in bf16."""
    dims, batch, seq = SIZES[size]
    cfg, kind, rank = config(family, dims), getattr(torch, dtype), RANK * lora
    torch.manual_seed(0)
    model = build(dict(cfg), kind, attention, rank)
    selective = checkpoint(model, checkpointing) if checkpointing != "none" else Selective()
    given = inputs(cfg, batch, seq, kind)
    optimizer = memopt.create([p for p in model.parameters() if p.requires_grad], SPEC, lr=1e-4)
    box: dict[str, torch.Tensor] = {}

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return model(**given).loss

    def forward() -> None:
        box["loss"] = run()

    def backward() -> None:
        box.pop("loss").backward()

    forward(), backward(), optimizer.step(), optimizer.zero_grad()
    selective.stores.clear()
    kept = saved(model, run, selective.kept).nbytes
    curve = traced(("forward", forward), ("backward", backward), ("step", optimizer.step))
    own = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    held = sum(own.values()) + sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    e = estimate(cfg, SPEC, weights=dtype, batch=batch, seq=seq, attention=attention, lora=rank, device="cpu",
                 mixed="bf16" if mixed else "", checkpointing=checkpointing)  # fmt: skip
    if e.activations is None:
        raise SystemExit(f"{family}: {e.without}")
    predicted = max(sum(r.nbytes for r in e.rows if phase in r.phases) for phase in PHASES)
    return {
        "family": family, "size": size, "dtype": dtype, "attention": attention, "checkpointing": checkpointing,
        "lora": rank, "mixed": mixed, "saved_nbytes": kept, "saved_predicted": e.activations.saved,
        "saved_error": round(e.activations.saved / kept - 1, 6),
        "peak_nbytes": held + curve.peak, "peak_predicted": predicted,
        "peak_error": round(predicted / (held + curve.peak) - 1, 6),
        "moving_nbytes": curve.peak,
        "moving_error": round((predicted - held) / curve.peak - 1, 6),
    }  # fmt: skip


def cases() -> list[tuple[Any, ...]]:
    """Every family at both sizes and dtypes, without checkpointing and with each kind of it; eager attention, adapters
    and autocast for some."""
    from estimators.activations import MIXED

    both, hows = (0, 1), ("none", "full")
    listed: list[tuple[Any, ...]] = []
    for family in FAMILIES:
        attention = "eager" if family in ONLY_EAGER else "sdpa"
        listed += [(family, size, dtype, attention, how, False)
                   for size in both for dtype in ("bfloat16", "float32") for how in hows]  # fmt: skip
        listed += [(family, size, "bfloat16", attention, how, False) for size in both for how in ("selective", "every-2")]
        if family in ADAPTED:
            listed += [(family, size, "bfloat16", attention, how, True) for size in both for how in hows]
        if family in MIXED:
            listed += [(family, 0, "float32", attention, how, False, True) for how in hows]
    for family in ("llama", "qwen2", "gpt_neox", "mistral"):
        listed += [(family, size, "bfloat16", "eager", how, False) for size in both for how in hows]
    return listed


def main() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    results = [measure(*case) for case in cases()]
    worst = {
        key: max((abs(r[key]) for r in results), default=0.0) for key in ("saved_error", "peak_error", "moving_error")
    }
    import transformers

    out = Path(__file__).parent / "results"
    header = {"torch": torch.__version__, "transformers": transformers.__version__, "spec": SPEC,
              "python": sys.version.split()[0], "cases": len(results), "worst": worst}  # fmt: skip
    text = json.dumps({**header, "results": results}, indent=1)
    (out / "estimates_activations.json").write_text(text + "\n")
    (out / "estimates_activations.md").write_text(table(results, header))
    print(worst)


def table(results: list[dict[str, Any]], header: dict[str, Any]) -> str:
    names = ("family", "size", "dtype", "attention", "checkpointing", "LoRA", "autocast", "saved, bytes", "error",
             "peak, bytes", "error", "moving")  # fmt: skip
    lines = [
        "# Activations and peaks: predicted beside measured",
        "",
        f"torch {header['torch']}, transformers {header['transformers']}, CPU, {SPEC}; {len(results)} cases.",
        "Errors are predicted over measured, less one. *Peak* is weights, state and every allocation of forward,",
        "backward and step; *moving* is the peak without weights and state.",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for r in results:
        lines.append(f"| {r['family']} | {r['size']} | {r['dtype']} | {r['attention']} | "
                     f"{r['checkpointing']} | {r['lora'] or ''} | "
                     f"{'bf16' if r['mixed'] else ''} | {r['saved_nbytes']:,} | "
                     f"{r['saved_error']:+.2%} | {r['peak_nbytes']:,} | {r['peak_error']:+.2%} | "
                     f"{r['moving_error']:+.2%} |")  # fmt: skip
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
