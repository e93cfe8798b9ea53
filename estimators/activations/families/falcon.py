"""Falcon. Source: transformers' modeling_falcon.py."""

from __future__ import annotations

from estimators.activations.blocks import attend, layer_norm, rotated, tables
from estimators.activations.chain import Network, alike, called_with
from estimators.activations.head import loss
from estimators.activations.linear import linear
from estimators.activations.op import Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields
from estimators.models.families.parts import Heads


def falcon(f: Fields, step: Step) -> Network:
    """Query, key and value in one matrix. A causal mask is always made, one byte per element and sequence; keys and
    values of grouped heads are repeated before attention."""
    width, vocab, n = f.integer("hidden_size"), f.integer("vocab_size"), f.integer("num_attention_heads")
    new, bias, dim = (
        f.flag("new_decoder_architecture", False),
        f.flag("bias", False),
        f.divide("hidden_size", "num_attention_heads"),
    )
    ffn, parallel = f.optional("ffn_hidden_size") or 4 * width, f.flag("parallel_attn", True)
    kv = (f.optional("num_kv_heads") or n) if new else 1 if f.flag("multi_query", True) else n
    act, p, residual = f.text("activation", "gelu"), f.share("hidden_dropout", 0.0), f.share("attention_dropout", 0.0)
    two_norms = new and parallel and (f.optional("num_ln_in_parallel_attn") or 2) == 2
    a, tokens, mask = Heads(n, n if new else kv, dim), step.tokens, step.batch * step.seq**2
    for what, given in (("alibi", f.flag("alibi", False)), ("eager attention", step.attention == "eager")):
        if given:
            raise KeyError(what)

    def falcon_linear(t: Tape, x: Tensor, cols: int, rows: int) -> Tensor:
        """FalconLinear adds its bias in an operation of its own."""
        y = linear(t, x, cols, rows, transposed=True)
        return t.op([y], gradients=rows * t.item * t.trains, alias=True) if bias else y

    def attended(t: Tape, x: Tensor) -> Tensor:
        qkv = falcon_linear(t, x, width, (n + 2 * kv) * dim)
        q, k, v = (t.copy(qkv, tokens * heads * dim) for heads in (n, a.kv, a.kv))
        q, k = rotated(t, q), rotated(t, k)
        return falcon_linear(t, attend(t, step, q, k, v, a, mask=mask), width, width)

    def mlp(t: Tape, x: Tensor) -> Tensor:
        return falcon_linear(t, t.activation(falcon_linear(t, x, width, ffn), act), ffn, width)

    def embed(t: Tape) -> Tensor:
        return t.embedding(tokens, vocab, width, tied=f.flag("tie_word_embeddings", True))

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = layer_norm(t, x, width)
        inner = layer_norm(t, x, width) if two_norms else y
        y = attended(t, y)
        if not new and not parallel:
            x = t.add(x, t.dropout(y, residual))
            return t.add(x, t.dropout(mlp(t, layer_norm(t, x, width)), p))
        return t.add(x, t.dropout(t.add(mlp(t, inner), y), p))

    def head(t: Tape, x: Tensor) -> Tensor:
        return loss(t, step, layer_norm(t, x, width), width, vocab)

    return Network(embed, alike(layer, f.layers()), head, tables(step, dim), masks=called_with(step.seq**2))
