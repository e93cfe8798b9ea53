"""BERT, DistilBERT, RoBERTa and XLM-RoBERTa with their masked-language-model heads. Source: transformers'
modeling_bert.py, modeling_distilbert.py and modeling_roberta.py."""

from __future__ import annotations

from estimators.activations.blocks import attention, layer_norm
from estimators.activations.chain import Network, alike
from estimators.activations.head import loss
from estimators.activations.linear import linear
from estimators.activations.op import Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields
from estimators.models.families.parts import Heads


def distilbert(f: Fields, step: Step) -> Network:
    """BERT without token types and without dropout after attention."""
    width, ffn, vocab, n = f.integer("dim"), f.integer("hidden_dim"), f.integer("vocab_size"), f.integer("n_heads")
    p, act, tied = f.share("dropout", 0.1), f.text("activation", "gelu"), f.flag("tie_word_embeddings", True)
    drop = f.share("attention_dropout", 0.1)
    a, positions = Heads(n, n, f.divide("dim", "n_heads")), f.integer("max_position_embeddings", 512)

    def embed(t: Tape) -> Tensor:
        x = t.add(t.embedding(step.tokens, vocab, width, tied=tied), t.embedding(step.seq, positions, width))
        return t.dropout(layer_norm(t, x, width), p)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = attention(t, step, x, width, a, bias=True, out_bias=True, rope=False, drop=drop, narrow="bert")
        x = layer_norm(t, t.add(y, x), width)
        y = linear(t, t.activation(linear(t, x, width, ffn, bias=True), act), ffn, width, bias=True)
        return layer_norm(t, t.add(t.dropout(y, p), x), width)

    def head(t: Tape, x: Tensor) -> Tensor:
        y = t.activation(linear(t, x, width, width, bias=True), act)
        return loss(t, step, layer_norm(t, y, width), width, vocab, bias=True, upcast=False)

    return Network(embed, alike(layer, f.layers("n_layers")), head)


def bert(f: Fields, step: Step) -> Network:
    """A norm after each half of a layer; dropout before it."""
    width, ffn, vocab = f.integer("hidden_size"), f.integer("intermediate_size"), f.integer("vocab_size")
    n, p, act = f.integer("num_attention_heads"), f.share("hidden_dropout_prob", 0.1), f.text("hidden_act", "gelu")
    a, tied = Heads(n, n, f.divide("hidden_size", "num_attention_heads")), f.flag("tie_word_embeddings", True)
    positions, kinds = f.integer("max_position_embeddings", 512), f.integer("type_vocab_size", 2)
    drop = f.share("attention_probs_dropout_prob", 0.1)

    def embed(t: Tape) -> Tensor:
        x = t.add(t.embedding(step.tokens, vocab, width, tied=tied), t.embedding(step.tokens, kinds, width))
        x = t.add(x, t.embedding(step.seq, positions, width))
        return t.dropout(layer_norm(t, x, width), p)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = attention(t, step, x, width, a, bias=True, out_bias=True, rope=False, drop=drop, narrow="bert")
        x = layer_norm(t, t.add(x, t.dropout(y, p)), width)
        y = linear(t, t.activation(linear(t, x, width, ffn, bias=True), act), ffn, width, bias=True)
        return layer_norm(t, t.add(x, t.dropout(y, p)), width)

    def head(t: Tape, x: Tensor) -> Tensor:
        y = t.activation(linear(t, x, width, width, bias=True), "gelu")
        return loss(t, step, layer_norm(t, y, width), width, vocab, bias=True, upcast=False)

    return Network(embed, alike(layer, f.layers()), head)
