"""Published mixtures of experts: the fields of their config.json that change a shape."""

from __future__ import annotations

from typing import Any

from estimators.models.published.decoders import dimensions


def _deepseek(
    model_type: str, *dims: int, inner: int, routed: int, shared: int, dense: int, q_rank: int | None
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        **dimensions(*dims),
        "moe_intermediate_size": inner,
        "n_routed_experts": routed,
        "n_shared_experts": shared,
        "first_k_dense_replace": dense,
        "q_lora_rank": q_rank,
        "kv_lora_rank": 512,
        "num_experts_per_tok": 8 if model_type == "deepseek_v3" else 6,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "tie_word_embeddings": False,
    }


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"model_type": "mixtral", **dimensions(4096, 14336, 32, 32, 8, 32000), "num_local_experts": 8},
    "mixtral-8x22b": {"model_type": "mixtral", **dimensions(6144, 16384, 56, 48, 8, 32000), "num_local_experts": 8},
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe",
        **dimensions(2048, 5632, 24, 16, 16, 151936),
        "num_experts": 60,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen2-57b-a14b": {
        "model_type": "qwen2_moe",
        **dimensions(3584, 18944, 28, 28, 4, 151936),
        "num_experts": 64,
        "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20480,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        **dimensions(2048, 6144, 48, 32, 4, 151936),
        "head_dim": 128,
        "num_experts": 128,
        "moe_intermediate_size": 768,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        **dimensions(4096, 12288, 94, 64, 4, 151936),
        "head_dim": 128,
        "num_experts": 128,
        "moe_intermediate_size": 1536,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        **dimensions(2880, 2880, 24, 64, 8, 201088),
        "head_dim": 64,
        "num_local_experts": 32,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        **dimensions(2880, 2880, 36, 64, 8, 201088),
        "head_dim": 64,
        "num_local_experts": 128,
    },
    "deepseek-v2-lite": _deepseek(
        "deepseek_v2", 2048, 10944, 27, 16, 16, 102400, inner=1408, routed=64, shared=2, dense=1, q_rank=None
    ),
    "deepseek-v2": _deepseek(
        "deepseek_v2", 5120, 12288, 60, 128, 128, 102400, inner=1536, routed=160, shared=2, dense=1, q_rank=1536
    ),
    "deepseek-v3": _deepseek(
        "deepseek_v3", 7168, 18432, 61, 128, 128, 129280, inner=2048, routed=256, shared=1, dense=3, q_rank=1536
    ),
    "olmoe-1b-7b": {"model_type": "olmoe", **dimensions(2048, 1024, 16, 16, 16, 50304), "num_experts": 64},
}
