"""Phi 1 to 4. Source: transformers' modeling_phi.py and modeling_phi3.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, attention, decoder, heads, linear, norm
from estimators.fields import Fields


def phi(f: Fields) -> Shapes:
    """Attention and MLP side by side under one norm; biases everywhere, the head included."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    qk_norm = f.flag("qk_layernorm", False)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias=True, out_bias=True, out="dense")
        for which in ("q_layernorm", "k_layernorm") if qk_norm else ():
            yield from norm(f"{name}.self_attn.{which}", width // a.n, bias=True)
        yield from linear(f"{name}.mlp.fc1", ffn, width, bias=True)
        yield from linear(f"{name}.mlp.fc2", width, ffn, bias=True)
        yield from norm(f"{name}.input_layernorm", width, bias=True)

    return decoder(f, layer, norm_bias=True, final="final_layernorm", head_bias=True)


def phi3(f: Fields) -> Shapes:
    """Llama with query, key and value in one matrix, and gate and up in one."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)

    def layer(name: str, i: int) -> Shapes:
        yield from linear(f"{name}.self_attn.o_proj", width, a.n * a.dim)
        yield from linear(f"{name}.self_attn.qkv_proj", (a.n + 2 * a.kv) * a.dim, width)
        yield from linear(f"{name}.mlp.gate_up_proj", 2 * ffn, width)
        yield from linear(f"{name}.mlp.down_proj", width, ffn)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer)
