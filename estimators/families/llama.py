"""Llama and the models that are Llama with other defaults. Source: transformers' modeling_llama.py and its copies."""

from __future__ import annotations

from estimators.families.parts import Heads, Shapes, attention, decoder, gated_mlp, heads, norm
from estimators.fields import Fields


def _llama(f: Fields, a: Heads, *, bias: bool, mlp_bias: bool, tied: bool = False) -> Shapes:
    width, ffn = f.integer("hidden_size"), f.integer("intermediate_size")

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        yield from gated_mlp(f"{name}.mlp", width, ffn, mlp_bias)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer, tied=tied)


def llama(f: Fields) -> Shapes:
    return _llama(f, heads(f), bias=f.flag("attention_bias", False), mlp_bias=f.flag("mlp_bias", False))


granite = llama


def mistral(f: Fields) -> Shapes:
    return _llama(f, heads(f, kv=8), bias=False, mlp_bias=False)


def ministral3(f: Fields) -> Shapes:
    return _llama(f, heads(f, kv=8, dim=128), bias=False, mlp_bias=False)


def smollm3(f: Fields) -> Shapes:
    bias, mlp_bias = f.flag("attention_bias", False), f.flag("mlp_bias", False)
    return _llama(f, heads(f, kv=4), bias=bias, mlp_bias=mlp_bias, tied=True)
