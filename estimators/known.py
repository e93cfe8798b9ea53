"""Published configurations, field for field as their authors' config.json has them (fields that change no shape left
out). A name here is the published model's, in lower case, without its organisation."""

from __future__ import annotations

from typing import Any


def _layers(hidden: int, ffn: int, layers: int, heads: int, kv: int | None, vocab: int) -> dict[str, Any]:
    """The six fields that nearly every decoder has."""
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        **({} if kv is None else {"num_key_value_heads": kv}),
    }


def _llama(*dims: int, tied: bool = False) -> dict[str, Any]:
    return {"model_type": "llama", **_layers(*dims), "tie_word_embeddings": tied}


def _mistral(*dims: int, head_dim: int | None = None) -> dict[str, Any]:
    return {"model_type": "mistral", **_layers(*dims), "head_dim": head_dim, "tie_word_embeddings": False}


def _qwen2(*dims: int, tied: bool = False) -> dict[str, Any]:
    return {"model_type": "qwen2", **_layers(*dims), "tie_word_embeddings": tied}


def _qwen3(*dims: int, tied: bool = False) -> dict[str, Any]:
    return {"model_type": "qwen3", **_layers(*dims), "head_dim": 128, "tie_word_embeddings": tied}


def _gemma(model_type: str, *dims: int, head_dim: int = 256) -> dict[str, Any]:
    return {"model_type": model_type, **_layers(*dims), "head_dim": head_dim}


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "vocab_size": 50257,
    }


def _neox(*dims: int) -> dict[str, Any]:
    hidden, ffn, layers, heads, vocab = dims
    return {"model_type": "gpt_neox", **_layers(hidden, ffn, layers, heads, None, vocab), "tie_word_embeddings": False}


def _t5(width: int, ffn: int, layers: int, heads: int, head: int = 64, gated: bool = False) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "d_model": width,
        "d_ff": ffn,
        "num_layers": layers,
        "num_heads": heads,
        "d_kv": head,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def _whisper(width: int, layers: int, heads: int, vocab: int = 51865, **other: int) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "num_mel_bins": 80,
        "vocab_size": vocab,
        **other,
    }


def _deepseek(
    model_type: str, *dims: int, inner: int, routed: int, shared: int, dense: int, q_rank: int | None
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        **_layers(*dims),
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


def _bert(model_type: str, width: int, layers: int, heads: int, vocab: int, **other: int) -> dict[str, Any]:
    return {"model_type": model_type, **_layers(width, 4 * width, layers, heads, None, vocab), **other}


def _vit(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": 224,
        "patch_size": 16,
        "num_labels": 1000,
    }


_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
_BERT = {"max_position_embeddings": 512, "type_vocab_size": 2}

#: hidden, ffn, layers, heads, key and value heads, vocabulary — in that order wherever six numbers stand alone.
KNOWN: dict[str, dict[str, Any]] = {
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-30b": _llama(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": _llama(8192, 22016, 80, 64, 64, 32000),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128256),
    "llama-3.2-1b": {**_llama(2048, 8192, 16, 32, 8, 128256, tied=True), "head_dim": 64},
    "llama-3.2-3b": {**_llama(3072, 8192, 28, 24, 8, 128256, tied=True), "head_dim": 128},
    "llama-3.3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, tied=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, tied=True),
    "smollm3-3b": {"model_type": "smollm3", **_layers(2048, 11008, 36, 16, 4, 128256), "tie_word_embeddings": True},
    "yi-6b": _llama(4096, 11008, 32, 32, 4, 64000),
    "yi-34b": _llama(7168, 20480, 60, 56, 8, 64000),
    "deepseek-llm-7b": _llama(4096, 11008, 30, 32, 32, 102400),
    "mistral-7b-v0.1": _mistral(4096, 14336, 32, 32, 8, 32000),
    "mistral-7b-v0.3": _mistral(4096, 14336, 32, 32, 8, 32768),
    "mistral-nemo-12b": _mistral(5120, 14336, 40, 32, 8, 131072, head_dim=128),
    "mistral-small-24b": _mistral(5120, 32768, 40, 32, 8, 131072, head_dim=128),
    "mistral-large-123b": _mistral(12288, 28672, 88, 96, 8, 32768, head_dim=128),
    "mixtral-8x7b": {"model_type": "mixtral", **_layers(4096, 14336, 32, 32, 8, 32000), "num_local_experts": 8},
    "mixtral-8x22b": {"model_type": "mixtral", **_layers(6144, 16384, 56, 48, 8, 32000), "num_local_experts": 8},
    "qwen2-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2-7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2-72b": _qwen2(8192, 29568, 80, 64, 8, 152064),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 152064),
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe",
        **_layers(2048, 5632, 24, 16, 16, 151936),
        "num_experts": 60,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen2-57b-a14b": {
        "model_type": "qwen2_moe",
        **_layers(3584, 18944, 28, 28, 4, 151936),
        "num_experts": 64,
        "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20480,
    },
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, 151936, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, 151936, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, 151936, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, 151936),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, 151936),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, 151936),
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        **_layers(2048, 6144, 48, 32, 4, 151936),
        "head_dim": 128,
        "num_experts": 128,
        "moe_intermediate_size": 768,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        **_layers(4096, 12288, 94, 64, 4, 151936),
        "head_dim": 128,
        "num_experts": 128,
        "moe_intermediate_size": 1536,
    },
    "gemma-2b": _gemma("gemma", 2048, 16384, 18, 8, 1, 256000),
    "gemma-7b": _gemma("gemma", 3072, 24576, 28, 16, 16, 256000),
    "gemma-2-2b": _gemma("gemma2", 2304, 9216, 26, 8, 4, 256000),
    "gemma-2-9b": _gemma("gemma2", 3584, 14336, 42, 16, 8, 256000),
    "gemma-2-27b": _gemma("gemma2", 4608, 36864, 46, 32, 16, 256000, head_dim=128),
    "gemma-3-270m": _gemma("gemma3_text", 640, 2048, 18, 4, 1, 262144),
    "gemma-3-1b": _gemma("gemma3_text", 1152, 6912, 26, 4, 1, 262144),
    "phi-1.5": {"model_type": "phi", **_layers(2048, 8192, 24, 32, None, 51200)},
    "phi-2": {"model_type": "phi", **_layers(2560, 10240, 32, 32, 32, 51200)},
    "phi-3-mini": {"model_type": "phi3", **_layers(3072, 8192, 32, 32, 32, 32064)},
    "phi-3-medium": {"model_type": "phi3", **_layers(5120, 17920, 40, 40, 10, 32064)},
    "phi-4": {"model_type": "phi3", **_layers(5120, 17920, 40, 40, 10, 100352)},
    "phi-4-mini": {"model_type": "phi3", **_layers(3072, 8192, 32, 24, 8, 200064), "tie_word_embeddings": True},
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "gpt-j-6b": {
        "model_type": "gptj",
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_positions": 2048,
        "vocab_size": 50400,
    },
    "gpt-neox-20b": _neox(6144, 24576, 44, 64, 50432),
    "pythia-70m": _neox(512, 2048, 6, 8, 50304),
    "pythia-160m": _neox(768, 3072, 12, 12, 50304),
    "pythia-410m": _neox(1024, 4096, 24, 16, 50304),
    "pythia-1b": _neox(2048, 8192, 16, 8, 50304),
    "pythia-1.4b": _neox(2048, 8192, 24, 16, 50304),
    "pythia-2.8b": _neox(2560, 10240, 32, 32, 50304),
    "pythia-6.9b": _neox(4096, 16384, 32, 32, 50432),
    "pythia-12b": _neox(5120, 20480, 36, 40, 50688),
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        **_layers(2880, 2880, 24, 64, 8, 201088),
        "head_dim": 64,
        "num_local_experts": 32,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        **_layers(2880, 2880, 36, 64, 8, 201088),
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
    "olmo-1b": {"model_type": "olmo", **_layers(2048, 8192, 16, 16, 16, 50304), "tie_word_embeddings": True},
    "olmo-7b": {"model_type": "olmo", **_layers(4096, 11008, 32, 32, 32, 50304)},
    "olmo-2-1b": {"model_type": "olmo2", **_layers(2048, 8192, 16, 16, 16, 100352)},
    "olmo-2-7b": {"model_type": "olmo2", **_layers(4096, 11008, 32, 32, 32, 100352)},
    "olmo-2-13b": {"model_type": "olmo2", **_layers(5120, 13824, 40, 40, 40, 100352)},
    "olmoe-1b-7b": {"model_type": "olmoe", **_layers(2048, 1024, 16, 16, 16, 50304), "num_experts": 64},
    "falcon-7b": {
        "model_type": "falcon",
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "vocab_size": 65024,
        "multi_query": True,
        "parallel_attn": True,
    },
    "falcon-40b": {
        "model_type": "falcon",
        "hidden_size": 8192,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "vocab_size": 65024,
        "new_decoder_architecture": True,
        "parallel_attn": True,
    },
    "starcoder2-3b": {"model_type": "starcoder2", **_layers(3072, 12288, 30, 24, 2, 49152)},
    "starcoder2-7b": {"model_type": "starcoder2", **_layers(4608, 18432, 32, 36, 4, 49152)},
    "starcoder2-15b": {
        "model_type": "starcoder2",
        **_layers(6144, 24576, 40, 48, 4, 49152),
        "tie_word_embeddings": False,
    },
    "command-r-35b": {"model_type": "cohere", **_layers(8192, 22528, 40, 64, 64, 256000)},
    "opt-125m": {
        "model_type": "opt",
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 50272,
    },
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 50272,
    },
    "opt-6.7b": {
        "model_type": "opt",
        "hidden_size": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 50272,
    },
    "bloom-560m": {"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880},
    "bloom-7b1": {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
    "bloom-176b": {"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880},
    "bert-base-uncased": _bert("bert", 768, 12, 12, 30522, **_BERT),
    "bert-large-uncased": _bert("bert", 1024, 24, 16, 30522, **_BERT),
    "roberta-base": _bert("roberta", 768, 12, 12, 50265, **_ROBERTA),
    "roberta-large": _bert("roberta", 1024, 24, 16, 50265, **_ROBERTA),
    "xlm-roberta-base": _bert("xlm-roberta", 768, 12, 12, 250002, **_ROBERTA),
    "xlm-roberta-large": _bert("xlm-roberta", 1024, 24, 16, 250002, **_ROBERTA),
    "distilbert-base-uncased": {
        "model_type": "distilbert",
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
        "vocab_size": 30522,
    },
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
    "t5-3b": _t5(1024, 16384, 24, 32, 128),
    "t5-11b": _t5(1024, 65536, 24, 128, 128),
    "flan-t5-base": _t5(768, 2048, 12, 12, gated=True),
    "flan-t5-xl": _t5(2048, 5120, 24, 32, gated=True),
    "flan-t5-xxl": _t5(4096, 10240, 24, 64, gated=True),
    "vit-base-patch16-224": _vit(768, 12, 12),
    "vit-large-patch16-224": _vit(1024, 24, 16),
    "whisper-tiny": _whisper(384, 4, 6),
    "whisper-base": _whisper(512, 6, 8),
    "whisper-small": _whisper(768, 12, 12),
    "whisper-medium": _whisper(1024, 24, 16),
    "whisper-large-v2": _whisper(1280, 32, 20),
    "whisper-large-v3": _whisper(1280, 32, 20, 51866, num_mel_bins=128),
}
