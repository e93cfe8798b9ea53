"""BLOOM. Source: transformers' modeling_bloom.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, linear, norm
from estimators.fields import Fields


def bloom(f: Fields) -> Shapes:
    """A norm on the embedding, query, key and value in one matrix, a tied head. Older files call the width n_embed."""
    old = f.optional("n_embed")
    width, vocab = old or f.integer("hidden_size"), f.integer("vocab_size")
    yield "transformer.word_embeddings.weight", (vocab, width)
    yield from norm("transformer.word_embeddings_layernorm", width, bias=True)
    for i in range(f.layers("n_layer")):
        name = f"transformer.h.{i}"
        yield from norm(f"{name}.input_layernorm", width, bias=True)
        yield from linear(f"{name}.self_attention.query_key_value", 3 * width, width, bias=True)
        yield from linear(f"{name}.self_attention.dense", width, width, bias=True)
        yield from norm(f"{name}.post_attention_layernorm", width, bias=True)
        yield from linear(f"{name}.mlp.dense_h_to_4h", 4 * width, width, bias=True)
        yield from linear(f"{name}.mlp.dense_4h_to_h", width, 4 * width, bias=True)
    yield from norm("transformer.ln_f", width, bias=True)
    if not f.flag("tie_word_embeddings", True):
        yield "lm_head.weight", (vocab, width)
