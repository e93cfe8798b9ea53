"""DeepSeek V2 and V3: multi-head latent attention, experts beside shared ones. Source: transformers'
modeling_deepseek_v2.py and modeling_deepseek_v3.py, with ``grouped_mm`` experts."""

from __future__ import annotations

from estimators.activations.blocks import gated_mlp, rms_norm
from estimators.activations.chain import Layer, Network
from estimators.activations.families.llama import network
from estimators.activations.families.moe import grouped
from estimators.activations.linear import linear
from estimators.activations.op import FP32, INT64, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields


def _latent(f: Fields, step: Step, turned: Layer) -> Layer:
    """Queries through a bottleneck (or none), keys and values through another. ``turned`` rotates a tensor's part that
    has positions."""
    width, n, bias = f.integer("hidden_size"), f.integer("num_attention_heads"), f.flag("attention_bias", False)
    rope, nope, v = f.integer("qk_rope_head_dim", 64), f.integer("qk_nope_head_dim", 128), f.integer("v_head_dim", 128)
    q_rank, kv_rank = f.optional("q_lora_rank", 1536), f.integer("kv_lora_rank", 512)
    if step.attention == "eager" and v != nope + rope:
        raise KeyError("eager attention with values narrower than keys")
    tokens, dim = step.tokens, nope + rope

    def attended(t: Tape, x: Tensor) -> Tensor:
        if q_rank is None:
            q = linear(t, x, width, n * dim)
        else:
            q = linear(t, rms_norm(t, linear(t, x, width, q_rank, bias), q_rank), q_rank, n * dim)
        latent = linear(t, x, width, kv_rank + rope, bias)
        kv = rms_norm(t, t.op([latent], tokens * kv_rank, alias=True), kv_rank)
        q_rot = turned(t, t.op([q], tokens * n * rope, alias=True))
        k_rot = turned(t, t.op([latent], tokens * rope, alias=True))
        query = t.op([q, q_rot], tokens * n * dim)
        both = linear(t, kv, kv_rank, n * (nope + v))
        key = t.op([both, k_rot], tokens * n * dim)
        return linear(t, latent_attend(t, query, key, both), n * v, width, bias)

    def latent_attend(t: Tape, query: Tensor, key: Tensor, both: Tensor) -> Tensor:
        """The values are a view of what the keys come from. The result is laid out head by head, as the queries are,
        and copied for the output projection."""
        result, read = t.tensor(tokens * n, FP32), [query, key, both]
        return t.copy(t.op(read, tokens * n * v, saves=[*read, result], saves_out=True, product=True, beside=[result]))

    return attended


def _experts(f: Fields, router: Layer, shared: int, top: int) -> Layer:
    width, inner = f.integer("hidden_size"), f.integer("moe_intermediate_size")
    count, together = f.experts("n_routed_experts"), shared * inner

    def block(t: Tape, x: Tensor) -> Tensor:
        routed = grouped(t, x, router(t, x), width, inner, count, top)
        return t.add(routed, gated_mlp(t, x, width, together, "silu"))

    return block


def _decoder(
    f: Fields, step: Step, turned: Layer, router: Layer, top: int, *, dense: int, shared: int, table: int
) -> Network:
    width, ffn = f.integer("hidden_size"), f.integer("intermediate_size")
    attended, sparse = _latent(f, step, turned), _experts(f, router, f.integer("n_shared_experts", shared), top)
    first = f.integer("first_k_dense_replace", dense, least=0)

    def norm(t: Tape, x: Tensor) -> Tensor:
        return rms_norm(t, x, width)

    def with_mlp(inner: Layer) -> Layer:
        def layer(t: Tape, x: Tensor) -> Tensor:
            x = t.add(x, attended(t, norm(t, x)))
            return t.add(x, inner(t, norm(t, x)))

        return layer

    kinds = {"dense": with_mlp(lambda t, x: gated_mlp(t, x, width, ffn, "silu")), "experts": with_mlp(sparse)}
    names = ["dense" if i < first else "experts" for i in range(f.layers())]
    return network(
        f,
        step,
        kinds["experts"],
        norm,
        rope=f.integer("qk_rope_head_dim", 64),
        table=table,
        layers=tuple((name, kinds[name]) for name in names),
    )


def deepseek_v3(f: Fields, step: Step) -> Network:
    """Scores by a sigmoid, chosen by groups; pairs of elements are rotated by halves of one table."""
    width, count, top = f.integer("hidden_size"), f.experts("n_routed_experts"), f.integer("num_experts_per_tok", 8)
    normalised = f.flag("norm_topk_prob", True)

    def turned(t: Tape, x: Tensor) -> Tensor:
        half = x.numel // 2
        parts = [t.add(t.op([x], half), t.op([x], half)) for _ in range(2)]
        return t.op(parts, x.numel)

    def router(t: Tape, x: Tensor) -> Tensor:
        scores = t.root(_logits(t, x, width, count))
        indices = t.tensor(step.tokens * top, INT64)
        best = t.op([scores], step.tokens * top, saves=[indices])
        if normalised:
            total = t.add(t.op([best], step.tokens), t.tensor(step.tokens, FP32))
            best = t.op([best, total], saves=[best, total])
        return t.copy(best)

    return _decoder(f, step, turned, router, top, dense=3, shared=1, table=0)


def deepseek_v2(f: Fields, step: Step) -> Network:
    """Scores by a softmax; positions rotate complex numbers in fp32."""
    width, count, top = f.integer("hidden_size"), f.experts("n_routed_experts"), f.integer("num_experts_per_tok")

    def turned(t: Tape, x: Tensor) -> Tensor:
        wide = t.cast(x, FP32) if x.item != FP32 else x
        return t.cast(t.copy(t.copy(wide)), x.item)

    def router(t: Tape, x: Tensor) -> Tensor:
        scores = t.root(_logits(t, x, width, count))
        return t.copy(t.op([scores], step.tokens * top, saves=[t.tensor(step.tokens * top, INT64)]))

    return _decoder(f, step, turned, router, top, dense=0, shared=2, table=FP32)


def _logits(t: Tape, x: Tensor, width: int, count: int) -> Tensor:
    """The router's product in fp32, of copies of its input and its weight."""
    x = t.cast(x, FP32)
    copies = [t.tensor(count * width, FP32)] if t.item != FP32 else []
    saves = [*([x] if t.trains else []), *copies]
    return t.op(
        [x], x.numel // width * count, FP32, saves=saves, gradients=count * width * t.item * t.trains, product=True
    )
