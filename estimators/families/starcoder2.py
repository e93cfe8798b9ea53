"""StarCoder 2. Source: transformers' modeling_starcoder2.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, attention, decoder, heads, linear, norm
from estimators.fields import Fields


def starcoder2(f: Fields) -> Shapes:
    """A plain MLP, LayerNorm, biases everywhere, a tied embedding."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=2)
    bias = f.flag("use_bias", True)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        yield from linear(f"{name}.mlp.c_fc", ffn, width, bias)
        yield from linear(f"{name}.mlp.c_proj", width, ffn, bias)
        yield from norm(f"{name}.input_layernorm", width, bias=True)
        yield from norm(f"{name}.post_attention_layernorm", width, bias=True)

    return decoder(f, layer, tied=True, norm_bias=True)
