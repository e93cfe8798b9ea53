"""Llama and its kin: grouped heads and a gated MLP. Source: transformers' modeling file of each ``model_type``."""

from __future__ import annotations

from estimators.models.config_fields import Fields
from estimators.models.families.parts import Heads, Shapes, attention, decoder, gated_mlp, heads, linear, norm


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


_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")


_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _gemma(f: Fields, a: Heads, norms: tuple[str, ...], *, qk_norm: bool = False, vocab: int | None = None) -> Shapes:
    width, ffn = f.integer("hidden_size"), f.integer("intermediate_size")
    bias = f.flag("attention_bias", False)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        for which in ("q_norm", "k_norm") if qk_norm else ():
            yield from norm(f"{name}.self_attn.{which}", a.dim)
        yield from gated_mlp(f"{name}.mlp", width, ffn)
        for which in norms:
            yield from norm(f"{name}.{which}", width)

    return decoder(f, layer, tied=True, vocab=vocab)


def gemma(f: Fields) -> Shapes:
    """Llama with a tied embedding and heads of 256."""
    return _gemma(f, heads(f, kv=16, dim=256), _TWO_NORMS)


def gemma2(f: Fields) -> Shapes:
    """A norm before and after each half of a layer."""
    return _gemma(f, heads(f, kv=4, dim=256), _FOUR_NORMS)


def gemma3_text(f: Fields) -> Shapes:
    """Gemma 2 with a norm over each query and key head. Its nested configurations leave out what is the default."""
    return _gemma(f, heads(f, n=8, kv=4, dim=256), _FOUR_NORMS, qk_norm=True, vocab=262208)


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


def cohere(f: Fields) -> Shapes:
    """Attention and MLP side by side under one norm, a tied embedding."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size", 22528), heads(f)
    bias, qk_norm = f.flag("attention_bias", False), f.flag("use_qk_norm", False)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        if qk_norm:
            yield f"{name}.self_attn.q_norm.weight", (a.n, a.dim)
            yield f"{name}.self_attn.k_norm.weight", (a.kv, a.dim)
        yield from gated_mlp(f"{name}.mlp", width, ffn)
        yield from norm(f"{name}.input_layernorm", width)

    return decoder(f, layer, tied=True)
