"""OLMo 1, 2, 3 and OLMoE. Source: transformers' modeling_olmo.py, modeling_olmo2.py, modeling_olmo3.py and
modeling_olmoe.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, attention, decoder, experts, gated_mlp, heads, norm
from estimators.fields import Fields


def olmo(f: Fields) -> Shapes:
    """Llama with norms that have no parameters."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    bias = f.flag("attention_bias", False)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        yield from gated_mlp(f"{name}.mlp", width, ffn)

    return decoder(f, layer, final="")


def olmo2(f: Fields) -> Shapes:
    """Norms after each half of a layer, and over all queries and all keys together."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    bias = f.flag("attention_bias", False)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        yield from norm(f"{name}.self_attn.q_norm", a.n * a.dim)
        yield from norm(f"{name}.self_attn.k_norm", a.kv * a.dim)
        yield from gated_mlp(f"{name}.mlp", width, ffn)
        yield from norm(f"{name}.post_attention_layernorm", width)
        yield from norm(f"{name}.post_feedforward_layernorm", width)

    return decoder(f, layer)


olmo3 = olmo2


def olmoe(f: Fields) -> Shapes:
    """Experts, and a norm over all queries and all keys together."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    count, bias = f.experts("num_experts"), f.flag("attention_bias", False)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        yield from norm(f"{name}.self_attn.q_norm", width)
        yield from norm(f"{name}.self_attn.k_norm", width // a.n * a.kv)
        yield from experts(f"{name}.mlp", count, width, ffn)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer)
