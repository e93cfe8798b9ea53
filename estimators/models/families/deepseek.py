"""DeepSeek V2 and V3: multi-head latent attention and fine-grained experts. Source: transformers'
modeling_deepseek_v2.py and modeling_deepseek_v3.py, whose training model has no multi-token-prediction layers."""

from __future__ import annotations

from estimators.models.config_fields import Fields
from estimators.models.families.parts import Shapes, decoder, experts, gated_mlp, linear, norm


def _latent_attention(f: Fields, name: str, bias: bool) -> Shapes:
    """Queries through a bottleneck of ``q_lora_rank`` (or none), keys and values through one of ``kv_lora_rank``."""
    width, n = f.integer("hidden_size"), f.integer("num_attention_heads")
    rope, nope, v = f.integer("qk_rope_head_dim", 64), f.integer("qk_nope_head_dim", 128), f.integer("v_head_dim", 128)
    q_rank, kv_rank = f.optional("q_lora_rank", 1536), f.integer("kv_lora_rank", 512)
    if q_rank is None:
        yield from linear(f"{name}.q_proj", n * (nope + rope), width)
    else:
        yield from linear(f"{name}.q_a_proj", q_rank, width, bias)
        yield from norm(f"{name}.q_a_layernorm", q_rank)
        yield from linear(f"{name}.q_b_proj", n * (nope + rope), q_rank)
    yield from linear(f"{name}.kv_a_proj_with_mqa", kv_rank + rope, width, bias)
    yield from norm(f"{name}.kv_a_layernorm", kv_rank)
    yield from linear(f"{name}.kv_b_proj", n * (nope + v), kv_rank)
    yield from linear(f"{name}.o_proj", width, n * v, bias)


def _deepseek(f: Fields, *, first_dense: int, shared: int, mlp_bias: bool) -> Shapes:
    width, ffn, inner = f.integer("hidden_size"), f.integer("intermediate_size"), f.integer("moe_intermediate_size")
    count, together = f.experts("n_routed_experts"), f.integer("n_shared_experts", shared)
    dense, bias = f.integer("first_k_dense_replace", first_dense, least=0), f.flag("attention_bias", False)

    def layer(name: str, i: int) -> Shapes:
        yield from _latent_attention(f, f"{name}.self_attn", bias)
        if i < dense:
            yield from gated_mlp(f"{name}.mlp", width, ffn, mlp_bias)
        else:
            yield from experts(f"{name}.mlp", count, width, inner)
            yield from gated_mlp(f"{name}.mlp.shared_experts", width, together * inner, mlp_bias)
        yield from norm(f"{name}.input_layernorm", width)
        yield from norm(f"{name}.post_attention_layernorm", width)

    return decoder(f, layer)


def deepseek_v2(f: Fields) -> Shapes:
    return _deepseek(f, first_dense=0, shared=2, mlp_bias=f.flag("mlp_bias", False))


def deepseek_v3(f: Fields) -> Shapes:
    return _deepseek(f, first_dense=3, shared=1, mlp_bias=False)
