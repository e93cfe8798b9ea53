"""Qwen 2, 2.5 and 3, dense. Source: transformers' modeling_qwen2.py and modeling_qwen3.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, attention, decoder, gated_mlp, heads, norm
from estimators.fields import Fields


def qwen2(f: Fields) -> Shapes:
    """Llama with biases on query, key and value."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=32)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias=True)
        yield from gated_mlp(f"{name}.mlp", width, ffn)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer)


def qwen3(f: Fields) -> Shapes:
    """Llama with a norm over each query and key head, and a head dimension of its own."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=32, dim=128)
    bias = f.flag("attention_bias", False)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        yield from norm(f"{name}.self_attn.q_norm", a.dim)
        yield from norm(f"{name}.self_attn.k_norm", a.dim)
        yield from gated_mlp(f"{name}.mlp", width, ffn)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer)
