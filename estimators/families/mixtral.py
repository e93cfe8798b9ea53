"""Mixtral: Mistral with experts. Source: transformers' modeling_mixtral.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, attention, decoder, experts, heads, norm
from estimators.fields import Fields


def mixtral(f: Fields) -> Shapes:
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=8)
    count = f.experts("num_local_experts")

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a)
        yield from experts(f"{name}.mlp", count, width, ffn)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer)
