"""The six fields that nearly every decoder has."""

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
