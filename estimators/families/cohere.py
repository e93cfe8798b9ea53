"""Command R. Source: transformers' modeling_cohere.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, attention, decoder, gated_mlp, heads, norm
from estimators.fields import Fields


def cohere(f: Fields) -> Shapes:
    """Attention and MLP side by side under one norm, a tied embedding."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size", 22528), heads(f)
    bias, qk_norm = f.flag("attention_bias", False), f.flag("use_qk_norm", False)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        if qk_norm:
            yield f"{name}.self_attn.q_norm.weight", (a.n, a.dim)
            yield f"{name}.self_attn.k_norm.weight", (a.kv, a.dim)
        yield from gated_mlp(f"{name}.mlp", width, ffn)
        yield from norm(f"{name}.input_layernorm", width)

    return decoder(f, layer, tied=True)
