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
    "gpt_bigcode": _GPT,
    "gptj": {**_GPT, "rotary_dim": 8},
    "deepseek_v2": _MLA,
    "deepseek_v3": {**_MLA, "first_k_dense_replace": 1},
    "roberta": _BERT,
    "vit": _VIT,
    "mixtral": _MOE,
    "olmoe": _MOE,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 160},
    "qwen3_moe": _MOE,
}
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
    if family in ("gpt_neox", "bert", "roberta", "vit", "opt"):
        base.pop("num_key_value_heads")
    return base


def build(cfg: dict[str, Any], dtype: torch.dtype, attention: str, checkpointed: bool, rank: int = 0) -> Any:
    import transformers

    auto = {"bert": transformers.AutoModelForMaskedLM, "roberta": transformers.AutoModelForMaskedLM,
            "distilbert": transformers.AutoModelForMaskedLM,
            "vit": transformers.AutoModelForImageClassification}  # fmt: skip
    made = transformers.AutoConfig.for_model(**cfg)
    made.use_cache = False
    model = auto.get(cfg["model_type"], transformers.AutoModelForCausalLM).from_config(
        made, dtype=dtype, attn_implementation=attention
    )
    if rank:
        adapt(model, rank)
    if checkpointed:
        model.gradient_checkpointing_enable()
        if rank:
            model.enable_input_require_grads()
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
    return {"input_ids": ids, "labels": ids}


def measure(family: str, size: int, dtype: str, attention: str, checkpointed: bool, lora: bool,
            mixed: bool = False) -> dict[str, Any]:  # fmt: skip
    """One case: predicted and real bytes. ``mixed``: fp32 weights under torch.autocast in bf16."""
    dims, batch, seq = SIZES[size]
    cfg, kind, rank = config(family, dims), getattr(torch, dtype), RANK * lora
    torch.manual_seed(0)
    model = build(dict(cfg), kind, attention, checkpointed, rank)
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
    kept = saved(model, run).nbytes
    curve = traced(("forward", forward), ("backward", backward), ("step", optimizer.step))
    own = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    held = sum(own.values()) + sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    e = estimate(cfg, SPEC, weights=dtype, batch=batch, seq=seq, attention=attention, lora=rank, device="cpu",
                 mixed="bf16" if mixed else "",
                 checkpointing="full" if checkpointed else "none")  # fmt: skip
    if e.activations is None:
        raise SystemExit(f"{family}: {e.without}")
    predicted = max(sum(r.nbytes for r in e.rows if phase in r.phases) for phase in PHASES)
    return {
        "family": family, "size": size, "dtype": dtype, "attention": attention, "checkpointing": checkpointed,
        "lora": rank, "mixed": mixed, "saved_nbytes": kept, "saved_predicted": e.activations.saved,
        "saved_error": round(e.activations.saved / kept - 1, 6),
        "peak_nbytes": held + curve.peak, "peak_predicted": predicted,
        "peak_error": round(predicted / (held + curve.peak) - 1, 6),
        "moving_nbytes": curve.peak,
        "moving_error": round((predicted - held) / curve.peak - 1, 6),
    }  # fmt: skip


def cases() -> list[tuple[Any, ...]]:
    """Every family at both sizes and dtypes, with checkpointing and without; eager attention, adapters and autocast for
    some."""
    from estimators.activations import MIXED

    listed: list[tuple[Any, ...]] = []
    for family in FAMILIES:
        attention = "eager" if family in ONLY_EAGER else "sdpa"
        for size in range(len(SIZES)):
            for dtype in ("bfloat16", "float32"):
                for checkpointed in (False, True):
                    listed.append((family, size, dtype, attention, checkpointed, False))
    for family in ("llama", "qwen2", "gpt_neox", "mistral"):
        listed += [(family, size, "bfloat16", "eager", c, False) for size in (0, 1) for c in (False, True)]
    for family in ("llama", "qwen3", "gemma", "phi3", "mistral", "gpt_neox", "phi", "bert", "starcoder2"):
        listed += [(family, size, "bfloat16", "sdpa", c, True) for size in (0, 1) for c in (False, True)]
    listed += [(f, 0, "float32", "sdpa", c, False, True) for f in FAMILIES if f in MIXED for c in (False, True)]
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
                     f"{'full' if r['checkpointing'] else 'none'} | {r['lora'] or ''} | "
                     f"{'bf16' if r['mixed'] else ''} | {r['saved_nbytes']:,} | "
                     f"{r['saved_error']:+.2%} | {r['peak_nbytes']:,} | {r['peak_error']:+.2%} | "
                     f"{r['moving_error']:+.2%} |")  # fmt: skip
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
