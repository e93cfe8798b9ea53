"""DistilBERT with its masked-language-model head. Source: transformers' modeling_distilbert.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, linear, norm
from estimators.fields import Fields


def distilbert(f: Fields) -> Shapes:
    width, ffn, vocab = f.integer("dim"), f.integer("hidden_dim"), f.integer("vocab_size")
    f.divide("dim", "n_heads")
    yield "distilbert.embeddings.word_embeddings.weight", (vocab, width)
    yield "distilbert.embeddings.position_embeddings.weight", (f.integer("max_position_embeddings", 512), width)
    yield from norm("distilbert.embeddings.LayerNorm", width, bias=True)
    for i in range(f.layers("n_layers")):
        name = f"distilbert.transformer.layer.{i}"
        for which in ("q_lin", "k_lin", "v_lin", "out_lin"):
            yield from linear(f"{name}.attention.{which}", width, width, bias=True)
        yield from norm(f"{name}.sa_layer_norm", width, bias=True)
        yield from linear(f"{name}.ffn.lin1", ffn, width, bias=True)
        yield from linear(f"{name}.ffn.lin2", width, ffn, bias=True)
        yield from norm(f"{name}.output_layer_norm", width, bias=True)
    yield from linear("vocab_transform", width, width, bias=True)
    yield from norm("vocab_layer_norm", width, bias=True)
    if not f.flag("tie_word_embeddings", True):
        yield "vocab_projector.weight", (vocab, width)
    yield "vocab_projector.bias", (vocab,)
