"""GPT-OSS. Source: transformers' modeling_gpt_oss.py."""

from __future__ import annotations

from estimators.models.config_fields import Fields
from estimators.models.families.parts import Shapes, attention, decoder, heads, linear, norm


def gpt_oss(f: Fields) -> Shapes:
    """One learned attention sink per head, biases everywhere, experts stored input first."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=8, dim=64)
    count, bias = f.experts("num_local_experts"), f.flag("attention_bias", True)

    def layer(name: str, i: int) -> Shapes:
        yield f"{name}.self_attn.sinks", (a.n,)
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        yield from linear(f"{name}.mlp.router", count, width, bias=True)
        yield f"{name}.mlp.experts.gate_up_proj", (count, width, 2 * ffn)
        yield f"{name}.mlp.experts.gate_up_proj_bias", (count, 2 * ffn)
        yield f"{name}.mlp.experts.down_proj", (count, ffn, width)
        yield f"{name}.mlp.experts.down_proj_bias", (count, width)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer)
