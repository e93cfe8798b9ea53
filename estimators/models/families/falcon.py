"""Falcon. Source: transformers' modeling_falcon.py."""

from __future__ import annotations

from estimators.models.config_fields import Fields
from estimators.models.families.parts import Shapes, linear, norm


def _norms(f: Fields, new: bool) -> tuple[str, ...]:
    """Names of the norms of one layer."""
    if not f.flag("parallel_attn", True):
        return "post_attention_layernorm", "input_layernorm"
    count = f.optional("num_ln_in_parallel_attn") or (2 if new else 1)
    return ("ln_attn", "ln_mlp") if count == 2 else ("input_layernorm",)


def falcon(f: Fields) -> Shapes:
    """Multi-query attention (7B) or grouped heads (40B), query, key and value in one matrix, a tied head."""
    width, vocab = f.integer("hidden_size"), f.integer("vocab_size")
    head, n = f.divide("hidden_size", "num_attention_heads"), f.integer("num_attention_heads")
    new, bias, ffn = f.flag("new_decoder_architecture", False), f.flag("bias", False), f.optional("ffn_hidden_size")
    kv = (f.optional("num_kv_heads") or n) if new else 1 if f.flag("multi_query", True) else n
    norms = _norms(f, new)
    yield "transformer.word_embeddings.weight", (vocab, width)
    for i in range(f.layers()):
        name = f"transformer.h.{i}"
        yield from linear(f"{name}.self_attention.query_key_value", (n + 2 * kv) * head, width, bias)
        yield from linear(f"{name}.self_attention.dense", width, width, bias)
        yield from linear(f"{name}.mlp.dense_h_to_4h", ffn or 4 * width, width, bias)
        yield from linear(f"{name}.mlp.dense_4h_to_h", width, ffn or 4 * width, bias)
        for which in norms:
            yield from norm(f"{name}.{which}", width, bias=True)
    yield from norm("transformer.ln_f", width, bias=True)
    if not f.flag("tie_word_embeddings", True):
        yield "lm_head.weight", (vocab, width)
