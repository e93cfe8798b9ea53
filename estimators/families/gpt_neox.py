"""GPT-NeoX and Pythia. Source: transformers' modeling_gpt_neox.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, linear, norm
from estimators.fields import Fields


def gpt_neox(f: Fields) -> Shapes:
    width, ffn, vocab = f.integer("hidden_size"), f.integer("intermediate_size"), f.integer("vocab_size")
    bias = f.flag("attention_bias", True)
    yield "gpt_neox.embed_in.weight", (vocab, width)
    for i in range(f.layers()):
        name = f"gpt_neox.layers.{i}"
        yield from norm(f"{name}.input_layernorm", width, bias=True)
        yield from norm(f"{name}.post_attention_layernorm", width, bias=True)
        yield from linear(f"{name}.attention.query_key_value", 3 * width, width, bias)
        yield from linear(f"{name}.attention.dense", width, width, bias)
        yield from linear(f"{name}.mlp.dense_h_to_4h", ffn, width, bias=True)
        yield from linear(f"{name}.mlp.dense_4h_to_h", width, ffn, bias=True)
    yield from norm("gpt_neox.final_layer_norm", width, bias=True)
    if not f.flag("tie_word_embeddings", False):
        yield "lm_head.weight", (vocab, width)
