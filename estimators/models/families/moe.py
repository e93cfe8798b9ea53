"""Mixtral, Qwen and OLMoE with experts. Source: transformers' modeling file of each ``model_type``."""

from __future__ import annotations

from collections.abc import Callable

from estimators.models.config_fields import Fields
from estimators.models.families.parts import Shapes, attention, decoder, experts, gated_mlp, heads, norm


def mixtral(f: Fields) -> Shapes:
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=8)
    count = f.experts("num_local_experts")

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a)
        yield from experts(f"{name}.mlp", count, width, ffn)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer)


def sparse(f: Fields) -> Callable[[int], bool]:
    """Whether layer ``i`` has experts."""
    dense, every = f.integers("mlp_only_layers"), f.integer("decoder_sparse_step", 1)
    return lambda i: i not in dense and (i + 1) % every == 0


def qwen2_moe(f: Fields) -> Shapes:
    """Experts, and one shared expert behind a gate of its own."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size", 5632), heads(f, kv=16)
    count, inner = f.experts("num_experts"), f.integer("moe_intermediate_size")
    shared, bias, has_experts = f.integer("shared_expert_intermediate_size"), f.flag("qkv_bias", True), sparse(f)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias)
        if has_experts(i):
            yield from experts(f"{name}.mlp", count, width, inner)
            yield from gated_mlp(f"{name}.mlp.shared_expert", width, shared)
            yield f"{name}.mlp.shared_expert_gate.weight", (1, width)
        else:
            yield from gated_mlp(f"{name}.mlp", width, ffn)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer)


def qwen3_moe(f: Fields) -> Shapes:
    """Experts without a shared one; a norm over each query and key head."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size", 6144), heads(f, kv=4)
    count, inner = f.experts("num_experts"), f.integer("moe_intermediate_size")
    bias, has_experts = f.flag("attention_bias", False), sparse(f)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        yield from norm(f"{name}.self_attn.q_norm", a.dim)
        yield from norm(f"{name}.self_attn.k_norm", a.dim)
        if has_experts(i):
            yield from experts(f"{name}.mlp", count, width, inner)
        else:
            yield from gated_mlp(f"{name}.mlp", width, ffn)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer)


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
