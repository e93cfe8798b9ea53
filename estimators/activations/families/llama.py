"""Llama and its kin: RMSNorm, rotary positions, grouped heads, a gated MLP. Source: transformers' modeling files of
each ``model_type``."""

from __future__ import annotations

from estimators.activations.blocks import (
    attention,
    causal_mask,
    cohere_norm,
    fused_attention,
    gated_mlp,
    gemma_norm,
    plain_norm,
    rms_norm,
    rms_norm_fp32,
    tables,
)
from estimators.activations.chain import Layer, Network, alike, called_with
from estimators.activations.head import loss
from estimators.activations.op import FP32, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields
from estimators.models.families.parts import Heads, heads


def network(
    f: Fields,
    step: Step,
    layer: Layer,
    norm: Layer,
    *,
    rope: int,
    tied: bool = False,
    vocab: int | None = None,
    table: int = 0,
    scaled_embedding: bool = False,
    scaled: bool = False,
    capped: bool = False,
    head_bias: bool = False,
    layers: tuple[tuple[str, Layer], ...] = (),
) -> Network:
    """Embedding, equal layers (or ``layers``), a last norm and the loss. ``rope``: elements of a head that are
    rotated."""
    width = f.integer("hidden_size")
    rows = f.integer("vocab_size", vocab) if vocab else f.integer("vocab_size")
    shared = f.flag("tie_word_embeddings", tied)

    def embed(t: Tape) -> Tensor:
        x = t.scattered(t.embedding(step.tokens, -(-rows // step.tp), width, tied=shared))
        return t.copy(x) if scaled_embedding else x

    def head(t: Tape, x: Tensor) -> Tensor:
        return loss(t, step, norm(t, x), width, rows, bias=head_bias, scaled=scaled, capped=capped)

    made = tables(step, rope, table)
    return Network(embed, layers or alike(layer, f.layers()), head, made, masks=called_with(causal_mask(step)))


def _llama(
    f: Fields,
    step: Step,
    a: Heads,
    *,
    bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_norm: bool = False,
    tied: bool = False,
) -> Network:
    """Two norms, each before its half; ``head_norm``: queries and keys are normalised head by head."""
    width, ffn, act = f.integer("hidden_size"), f.integer("intermediate_size"), f.text("hidden_act", "silu")

    def norm(t: Tape, x: Tensor) -> Tensor:
        return rms_norm(t, x, width)

    def per_head(t: Tape, x: Tensor) -> Tensor:
        return rms_norm(t, x, a.dim)

    def layer(t: Tape, x: Tensor) -> Tensor:
        x = t.add(
            x,
            attention(
                t, step, norm(t, x), width, a, bias=bias, out_bias=out_bias, norm=per_head if head_norm else None
            ),
        )
        return t.add(x, gated_mlp(t, norm(t, x), width, ffn, act, mlp_bias))

    return network(f, step, layer, norm, rope=a.dim, tied=tied)


def llama(f: Fields, step: Step) -> Network:
    bias = f.flag("attention_bias", False)
    return _llama(f, step, heads(f), bias=bias, out_bias=bias, mlp_bias=f.flag("mlp_bias", False))


def mistral(f: Fields, step: Step) -> Network:
    return _llama(f, step, heads(f, kv=8))


def smollm3(f: Fields, step: Step) -> Network:
    bias = f.flag("attention_bias", False)
    return _llama(f, step, heads(f, kv=4), bias=bias, out_bias=bias, mlp_bias=f.flag("mlp_bias", False), tied=True)


def qwen2(f: Fields, step: Step) -> Network:
    return _llama(f, step, heads(f, kv=32), bias=True)


def qwen3(f: Fields, step: Step) -> Network:
    bias = f.flag("attention_bias", False)
    return _llama(f, step, heads(f, kv=32, dim=128), bias=bias, out_bias=bias, head_norm=True)


def phi3(f: Fields, step: Step) -> Network:
    """Llama with query, key and value in one matrix, and gate and up in one."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    act = f.text("hidden_act", "silu")

    def norm(t: Tape, x: Tensor) -> Tensor:
        return rms_norm(t, x, width)

    def layer(t: Tape, x: Tensor) -> Tensor:
        x = t.add(x, fused_attention(t, step, norm(t, x), width, a, bias=False, out_bias=False, rope=True))
        return t.add(x, gated_mlp(t, norm(t, x), width, ffn, act, fused=True))

    return network(f, step, layer, norm, rope=a.dim)


def gemma(f: Fields, step: Step) -> Network:
    a, width, ffn = heads(f, kv=16, dim=256), f.integer("hidden_size"), f.integer("intermediate_size")
    bias = f.flag("attention_bias", False)

    def norm(t: Tape, x: Tensor) -> Tensor:
        return gemma_norm(t, x, width)

    def layer(t: Tape, x: Tensor) -> Tensor:
        x = t.add(x, attention(t, step, norm(t, x), width, a, bias=bias, out_bias=bias))
        return t.add(x, gated_mlp(t, norm(t, x), width, ffn, "gelu_pytorch_tanh"))

    return network(f, step, layer, norm, rope=a.dim, tied=True, scaled_embedding=True)


def _four_norms(f: Fields, step: Step, a: Heads, *, head_norm: bool, capped: bool, vocab: int | None) -> Network:
    """Gemma 2 and 3: a norm before and after each half of a layer."""
    width, ffn, bias = f.integer("hidden_size"), f.integer("intermediate_size"), f.flag("attention_bias", False)

    def norm(t: Tape, x: Tensor) -> Tensor:
        return gemma_norm(t, x, width)

    def per_head(t: Tape, x: Tensor) -> Tensor:
        return gemma_norm(t, x, a.dim)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = attention(
            t,
            step,
            norm(t, x),
            width,
            a,
            bias=bias,
            out_bias=bias,
            softcap=capped,
            norm=per_head if head_norm else None,
        )
        x = t.add(x, norm(t, y))
        return t.add(x, norm(t, gated_mlp(t, norm(t, x), width, ffn, "gelu_pytorch_tanh")))

    return network(
        f,
        step,
        layer,
        norm,
        rope=a.dim * (2 if head_norm else 1),
        tied=True,
        vocab=vocab,
        scaled_embedding=True,
        capped=capped,
    )


def gemma2(f: Fields, step: Step) -> Network:
    """Soft caps on scores and logits, which only eager attention computes."""
    return _four_norms(
        f, step._replace(attention="eager"), heads(f, kv=4, dim=256), head_norm=False, capped=True, vocab=None
    )


def gemma3_text(f: Fields, step: Step) -> Network:
    """Two tables of positions, for layers with a window and without."""
    return _four_norms(f, step, heads(f, n=8, kv=4, dim=256), head_norm=True, capped=False, vocab=262208)


def olmo(f: Fields, step: Step) -> Network:
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    bias = f.flag("attention_bias", False)

    def norm(t: Tape, x: Tensor) -> Tensor:
        return plain_norm(t, x, width)

    def layer(t: Tape, x: Tensor) -> Tensor:
        x = t.add(x, attention(t, step, norm(t, x), width, a, bias=bias, out_bias=bias, table=FP32))
        return t.add(x, gated_mlp(t, norm(t, x), width, ffn, f.text("hidden_act", "silu")))

    return network(f, step, layer, norm, rope=a.dim, table=FP32)


def olmo2(f: Fields, step: Step) -> Network:
    """Norms after each half, and over all queries and all keys together."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    bias = f.flag("attention_bias", False)

    def norm(t: Tape, x: Tensor) -> Tensor:
        return rms_norm_fp32(t, x, width)

    def together(t: Tape, x: Tensor) -> Tensor:
        return rms_norm_fp32(t, x, x.numel // step.tokens)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = attention(t, step, x, width, a, bias=bias, out_bias=bias, norm=together, table=FP32)
        x = t.add(x, norm(t, y))
        return t.add(x, norm(t, gated_mlp(t, x, width, ffn, f.text("hidden_act", "silu"))))

    return network(f, step, layer, norm, rope=a.dim, table=FP32)


def glm4(f: Fields, step: Step) -> Network:
    """A norm before and after each half; half of each head is rotated, with tables that every layer makes anew."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=2, dim=128)
    bias = f.flag("attention_bias", True)

    def norm(t: Tape, x: Tensor) -> Tensor:
        return rms_norm(t, x, width)

    def layer(t: Tape, x: Tensor) -> Tensor:
        x = t.add(x, norm(t, attention(t, step, norm(t, x), width, a, bias=bias, partial=True)))
        return t.add(x, norm(t, gated_mlp(t, norm(t, x), width, ffn, "silu", fused=True)))

    return network(f, step, layer, norm, rope=a.dim // 2 * f.layers())


def cohere(f: Fields, step: Step) -> Network:
    """Attention and MLP side by side under one norm; logits are scaled."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    bias, qk_norm = f.flag("attention_bias", False), f.flag("use_qk_norm", False)

    def norm(t: Tape, x: Tensor) -> Tensor:
        return cohere_norm(t, x, width)

    def per_head(t: Tape, x: Tensor) -> Tensor:
        return cohere_norm(t, x, a.dim)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = norm(t, x)
        attended = attention(t, step, y, width, a, bias=bias, out_bias=bias, norm=per_head if qk_norm else None)
        return t.add(t.add(x, attended), gated_mlp(t, y, width, ffn, "silu"))

    return network(f, step, layer, norm, rope=a.dim, tied=True, scaled=True)


def ministral3(f: Fields, step: Step) -> Network:
    return _llama(f, step, heads(f, kv=8, dim=128))
