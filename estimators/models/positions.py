"""How long a sequence may be: the positions that a model was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIELDS = ("max_position_embeddings", "n_positions", "max_target_positions")

#: Built-in architectures by the beginning of their name, the longest that matches -> max_position_embeddings of the
#: published configuration. More runs (rotary positions have no end), but a plan offers no more.
_PUBLISHED = {
    "llama-": 2048,
    "llama-2-": 4096,
    "llama-3-": 8192,
    "llama-3.": 131072,
    "codellama-": 16384,
    "tinyllama": 2048,
    "smollm2": 8192,
    "smollm3": 65536,
    "yi-": 4096,
    "deepseek-llm": 4096,
    "deepseek-v": 163840,
    "mistral-": 32768,
    "mistral-nemo": 131072,
    "mistral-large": 131072,
    "mixtral-8x7b": 32768,
    "mixtral-8x22b": 65536,
    "qwen1.5-moe": 8192,
    "qwen2-": 131072,
    "qwen2.5-": 131072,
    "qwen2.5-0.5b": 32768,
    "qwen2.5-1.5b": 32768,
    "qwen2.5-3b": 32768,
    "qwen3-": 40960,
    "gemma-": 8192,
    "gemma-3-": 32768,
    "phi-1.5": 2048,
    "phi-2": 2048,
    "phi-3-": 4096,
    "phi-4": 16384,
    "phi-4-mini": 131072,
    "gpt-neox": 2048,
    "pythia": 2048,
    "gpt-oss": 131072,
    "olmo-": 2048,
    "olmo-2-": 4096,
    "olmoe": 4096,
    "falcon": 2048,
    "starcoder2": 16384,
    "command-r": 8192,
    "opt-": 2048,
    "bloom": 2048,
    "distilbert": 512,
    "whisper": 448,
}


def positions(config: Mapping[str, Any] | None, name: str = "") -> int:
    """The most tokens that a model has positions for; 0 where neither its configuration nor its name says.

    >>> positions({}, "llama-2-13b"), positions({"n_positions": 1024}), positions({}, "t5-small")
    (4096, 1024, 0)
    """
    given = ((config or {}).get(field) for field in _FIELDS)
    known = [n for n in given if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if known:
        return min(known)
    return max(((len(start), n) for start, n in _PUBLISHED.items() if name.startswith(start)), default=(0, 0))[1]


def default_seq(config: Mapping[str, Any] | None, name: str = "") -> int:
    """2048 tokens, or as many as the model has positions for where that is fewer; 0 without a configuration."""
    return 0 if config is None else min(2048, positions(config, name) or 2048)
