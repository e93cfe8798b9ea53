"""GPT-J. Source: transformers' modeling_gptj.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, linear, norm
from estimators.fields import Fields


def gptj(f: Fields) -> Shapes:
    """Attention and MLP side by side under one norm, a head with a bias."""
    width, vocab = f.integer("n_embd"), f.integer("vocab_size")
    ffn = f.optional("n_inner") or 4 * width
    yield "transformer.wte.weight", (vocab, width)
    for i in range(f.layers("n_layer")):
        name = f"transformer.h.{i}"
        yield from norm(f"{name}.ln_1", width, bias=True)
        for which in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{name}.attn.{which}", width, width)
        yield from linear(f"{name}.mlp.fc_in", ffn, width, bias=True)
        yield from linear(f"{name}.mlp.fc_out", width, ffn, bias=True)
    yield from norm("transformer.ln_f", width, bias=True)
    if not f.flag("tie_word_embeddings", False):
        yield "lm_head.weight", (vocab, width)
    yield "lm_head.bias", (vocab,)
