"""BERT, RoBERTa, XLM-RoBERTa and DistilBERT with their masked-language-model heads. Source: transformers'
modeling_bert.py, modeling_roberta.py and modeling_distilbert.py."""

from __future__ import annotations

from estimators.models.config_fields import Fields
from estimators.models.families.parts import Shapes, linear, norm


def _encoder(f: Fields, prefix: str) -> Shapes:
    """Embeddings and layers."""
    width, ffn = f.integer("hidden_size"), f.integer("intermediate_size")
    f.divide("hidden_size", "num_attention_heads")
    yield f"{prefix}.embeddings.word_embeddings.weight", (f.integer("vocab_size"), width)
    yield f"{prefix}.embeddings.position_embeddings.weight", (f.integer("max_position_embeddings", 512), width)
    yield f"{prefix}.embeddings.token_type_embeddings.weight", (f.integer("type_vocab_size", 2), width)
    yield from norm(f"{prefix}.embeddings.LayerNorm", width, bias=True)
    for i in range(f.layers()):
        name = f"{prefix}.encoder.layer.{i}"
        for which in ("query", "key", "value"):
            yield from linear(f"{name}.attention.self.{which}", width, width, bias=True)
        yield from linear(f"{name}.attention.output.dense", width, width, bias=True)
        yield from norm(f"{name}.attention.output.LayerNorm", width, bias=True)
        yield from linear(f"{name}.intermediate.dense", ffn, width, bias=True)
        yield from linear(f"{name}.output.dense", width, ffn, bias=True)
        yield from norm(f"{name}.output.LayerNorm", width, bias=True)


def _head(f: Fields, bias: str, dense: str, layer_norm: str, decoder: str) -> Shapes:
    """A transform, then the tied embedding with a bias."""
    width, vocab = f.integer("hidden_size"), f.integer("vocab_size")
    yield bias, (vocab,)
    yield from linear(dense, width, width, bias=True)
    yield from norm(layer_norm, width, bias=True)
    if not f.flag("tie_word_embeddings", True):
        yield from linear(decoder, vocab, width, bias=True)


def bert(f: Fields) -> Shapes:
    yield from _encoder(f, "bert")
    head = "cls.predictions"
    yield from _head(f, f"{head}.bias", f"{head}.transform.dense", f"{head}.transform.LayerNorm", f"{head}.decoder")


def roberta(f: Fields) -> Shapes:
    yield from _encoder(f, "roberta")
    yield from _head(f, "lm_head.bias", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")


def xlm_roberta(f: Fields) -> Shapes:
    """RoBERTa; its module lists the head first, so a shared embedding goes by the head's name."""
    embedding = "roberta.embeddings.word_embeddings.weight"
    tied = f.flag("tie_word_embeddings", True)
    for name, shape in roberta(f):
        yield ("lm_head.decoder.weight" if tied and name == embedding else name), shape


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
