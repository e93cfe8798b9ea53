"""GLM-4. Source: transformers' modeling_glm4.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, attention, decoder, heads, linear, norm
from estimators.fields import Fields

_NORMS = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")


def glm4(f: Fields) -> Shapes:
    """Biases on query, key and value, gate and up in one matrix, a norm before and after each half of a layer."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=2, dim=128)
    bias = f.flag("attention_bias", True)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias)
        yield from linear(f"{name}.mlp.gate_up_proj", 2 * ffn, width)
        yield from linear(f"{name}.mlp.down_proj", width, ffn)
        for which in _NORMS:
            yield from norm(f"{name}.{which}", width)

    return decoder(f, layer)
