"""Published decoders whose layers are all alike: the fields of their config.json that change a shape."""

from __future__ import annotations

from typing import Any


def dimensions(hidden: int, ffn: int, count: int, heads: int, kv: int | None, vocab: int) -> dict[str, Any]:
    """The six fields that nearly every decoder has."""
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": count,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        **({} if kv is None else {"num_key_value_heads": kv}),
    }


def _llama(*dims: int, tied: bool = False) -> dict[str, Any]:
    return {"model_type": "llama", **dimensions(*dims), "tie_word_embeddings": tied}


def _mistral(*dims: int, head_dim: int | None = None, window: int | None = None) -> dict[str, Any]:
    own = {"head_dim": head_dim, "tie_word_embeddings": False, "sliding_window": window}
    return {"model_type": "mistral", **dimensions(*dims), **own}


def _qwen2(*dims: int, tied: bool = False) -> dict[str, Any]:
    return {"model_type": "qwen2", **dimensions(*dims), "tie_word_embeddings": tied}


def _qwen3(*dims: int, tied: bool = False) -> dict[str, Any]:
    return {"model_type": "qwen3", **dimensions(*dims), "head_dim": 128, "tie_word_embeddings": tied}


def _gemma(model_type: str, *dims: int, head_dim: int = 256) -> dict[str, Any]:
    return {"model_type": model_type, **dimensions(*dims), "head_dim": head_dim}


def _starcoder2(*dims: int) -> dict[str, Any]:
    return {"model_type": "starcoder2", **dimensions(*dims), "sliding_window": 4096}


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
    return {
        "model_type": "gpt_neox",
        **dimensions(hidden, ffn, layers, heads, None, vocab),
        "tie_word_embeddings": False,
    }


#: hidden, ffn, layers, heads, key and value heads, vocabulary — in that order wherever six numbers stand alone.
DECODERS: dict[str, dict[str, Any]] = {
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-30b": _llama(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": _llama(8192, 22016, 80, 64, 64, 32000),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "codellama-7b": _llama(4096, 11008, 32, 32, 32, 32016),
    "codellama-13b": _llama(5120, 13824, 40, 40, 40, 32016),
    "codellama-34b": _llama(8192, 22016, 48, 64, 8, 32000),
    "codellama-70b": _llama(8192, 28672, 80, 64, 8, 32016),
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
    "smollm3-3b": {"model_type": "smollm3", **dimensions(2048, 11008, 36, 16, 4, 128256), "tie_word_embeddings": True},
    "yi-6b": _llama(4096, 11008, 32, 32, 4, 64000),
    "yi-34b": _llama(7168, 20480, 60, 56, 8, 64000),
    "deepseek-llm-7b": _llama(4096, 11008, 30, 32, 32, 102400),
    "mistral-7b-v0.1": _mistral(4096, 14336, 32, 32, 8, 32000, window=4096),
    "mistral-7b-v0.3": _mistral(4096, 14336, 32, 32, 8, 32768),
    "mistral-nemo-12b": _mistral(5120, 14336, 40, 32, 8, 131072, head_dim=128),
    "mistral-small-24b": _mistral(5120, 32768, 40, 32, 8, 131072, head_dim=128),
    "mistral-large-123b": _mistral(12288, 28672, 88, 96, 8, 32768, head_dim=128),
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
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, 151936, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, 151936, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, 151936, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, 151936),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, 151936),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, 151936),
    "gemma-2b": _gemma("gemma", 2048, 16384, 18, 8, 1, 256000),
    "gemma-7b": _gemma("gemma", 3072, 24576, 28, 16, 16, 256000),
    "gemma-2-2b": _gemma("gemma2", 2304, 9216, 26, 8, 4, 256000),
    "gemma-2-9b": _gemma("gemma2", 3584, 14336, 42, 16, 8, 256000),
    "gemma-2-27b": _gemma("gemma2", 4608, 36864, 46, 32, 16, 256000, head_dim=128),
    "gemma-3-270m": {**_gemma("gemma3_text", 640, 2048, 18, 4, 1, 262144), "sliding_window": 512},
    "gemma-3-1b": {**_gemma("gemma3_text", 1152, 6912, 26, 4, 1, 262144), "sliding_window": 512},
    "phi-1.5": {"model_type": "phi", **dimensions(2048, 8192, 24, 32, None, 51200)},
    "phi-2": {"model_type": "phi", **dimensions(2560, 10240, 32, 32, 32, 51200)},
    "phi-3-mini": {"model_type": "phi3", **dimensions(3072, 8192, 32, 32, 32, 32064), "sliding_window": 2047},
    "phi-3-medium": {"model_type": "phi3", **dimensions(5120, 17920, 40, 40, 10, 32064), "sliding_window": 2047},
    "phi-4": {"model_type": "phi3", **dimensions(5120, 17920, 40, 40, 10, 100352)},
    "phi-4-mini": {
        "model_type": "phi3",
        **dimensions(3072, 8192, 32, 24, 8, 200064),
        "tie_word_embeddings": True,
        "sliding_window": 262144,
    },
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
    "olmo-1b": {"model_type": "olmo", **dimensions(2048, 8192, 16, 16, 16, 50304), "tie_word_embeddings": True},
    "olmo-7b": {"model_type": "olmo", **dimensions(4096, 11008, 32, 32, 32, 50304)},
    "olmo-2-1b": {"model_type": "olmo2", **dimensions(2048, 8192, 16, 16, 16, 100352)},
    "olmo-2-7b": {"model_type": "olmo2", **dimensions(4096, 11008, 32, 32, 32, 100352)},
    "olmo-2-13b": {"model_type": "olmo2", **dimensions(5120, 13824, 40, 40, 40, 100352)},
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
    "starcoder2-3b": _starcoder2(3072, 12288, 30, 24, 2, 49152),
    "starcoder2-7b": _starcoder2(4608, 18432, 32, 36, 4, 49152),
    "starcoder2-15b": {**_starcoder2(6144, 24576, 40, 48, 4, 49152), "tie_word_embeddings": False},
    "command-r-35b": {"model_type": "cohere", **dimensions(8192, 22528, 40, 64, 64, 256000)},
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
}
