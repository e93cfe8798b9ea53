"""Gemma 1, 2 and 3 (text). Source: transformers' modeling_gemma.py, modeling_gemma2.py and modeling_gemma3.py."""

from __future__ import annotations

from estimators.families.parts import Heads, Shapes, attention, decoder, gated_mlp, heads, norm
from estimators.fields import Fields

_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _gemma(f: Fields, a: Heads, norms: tuple[str, ...], *, qk_norm: bool = False, vocab: int | None = None) -> Shapes:
    width, ffn = f.integer("hidden_size"), f.integer("intermediate_size")
    bias = f.flag("attention_bias", False)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        for which in ("q_norm", "k_norm") if qk_norm else ():
            yield from norm(f"{name}.self_attn.{which}", a.dim)
        yield from gated_mlp(f"{name}.mlp", width, ffn)
        for which in norms:
            yield from norm(f"{name}.{which}", width)

    return decoder(f, layer, tied=True, vocab=vocab)


def gemma(f: Fields) -> Shapes:
    """Llama with a tied embedding and heads of 256."""
    return _gemma(f, heads(f, kv=16, dim=256), _TWO_NORMS)


def gemma2(f: Fields) -> Shapes:
    """A norm before and after each half of a layer."""
    return _gemma(f, heads(f, kv=4, dim=256), _FOUR_NORMS)


def gemma3_text(f: Fields) -> Shapes:
    """Gemma 2 with a norm over each query and key head. Its nested configurations leave out what is the default."""
    return _gemma(f, heads(f, n=8, kv=4, dim=256), _FOUR_NORMS, qk_norm=True, vocab=262208)
