"""Mixtures of experts. Source: transformers' modeling_mixtral.py, modeling_qwen2_moe.py, modeling_qwen3_moe.py and
modeling_olmoe.py, with integrations/moe.py's ``grouped_mm`` experts: tokens sorted by expert, one product for all."""

from __future__ import annotations

from collections.abc import Callable

from estimators.activations.blocks import attention, gated_mlp, rms_norm
from estimators.activations.chain import Layer, Network
from estimators.activations.families.llama import network
from estimators.activations.linear import linear
from estimators.activations.op import FP32, INT64, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields
from estimators.models.families.moe import sparse
from estimators.models.families.parts import Heads, heads

_INT32 = 4


def experts(
    t: Tape, x: Tensor, width: int, inner: int, count: int, top: int, normalised: bool = True, cast: bool = True
) -> Tensor:
    """``top`` of ``count`` gated MLPs per token. Every token takes ``top`` rows, so the sum over experts does not
    depend on how evenly they are chosen. ``cast``: the chosen ones' weights go back to the dtype of the logits."""
    x = t.gathered(x)
    weights = _router(t, x, width, count, top, normalised)
    return t.scattered(grouped(t, x, t.cast(weights, t.mm) if cast else weights, width, inner, count, top))


def grouped(t: Tape, x: Tensor, weights: Tensor, width: int, inner: int, count: int, top: int) -> Tensor:
    """The experts' part, with the weights of those that were chosen."""

    def gated(t: Tape, both: Tensor) -> Tensor:
        gate, up = t.halves(both)
        return t.mul(t.activation(gate, "silu"), up)

    return dispatched(t, x, weights, width, inner, count, top, gated)


def dispatched(
    t: Tape,
    x: Tensor,
    weights: Tensor,
    width: int,
    inner: int,
    count: int,
    top: int,
    gated: Layer,
    biases: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Rows sorted by expert, up and gate in one product, ``gated``, down, weighted, back in order and summed.
    ``biases(each)`` are those of every row, ``each`` per expert, which a variable holds: the first ones until the
    second are there, those until the end. Where ``ep`` ranks share the experts, rows go to the rank of their expert and
    are sorted there, and come back; as many come as go, where experts are chosen evenly."""
    tokens = x.numel // width
    rows, inner, count = tokens * top, inner // t.step.tp, count // t.step.ep
    order, source, back = (t.tensor(rows, INT64) for _ in range(3))
    offsets = t.tensor(count, _INT32)
    chosen = t.op([x], rows * width, saves=[source])
    if t.step.ep > 1:
        chosen = t.op([t.copy(chosen)], saves=[t.tensor(rows, INT64)])
    weights = t.op([weights], saves=[order])
    up = 3 * count * inner * width * t.item * t.trains
    selected = biases(2 * inner) if biases else None
    both = t.op(
        [chosen],
        rows * 2 * inner,
        saves=[*([chosen] if t.trains else []), offsets],
        gradients=2 * up // 3,
        product=True,
    )
    product = gated(t, t.add_(both, selected) if selected else both)
    before, selected = selected, biases(width) if biases else None
    t.hold(*([before] if before else []))
    result = t.op(
        [product], rows * width, saves=[*([product] if t.trains else []), offsets], gradients=up // 3, product=True
    )
    result = t.add_(result, selected) if selected else result
    if t.step.ep > 1:
        result = t.copy(t.op([result], saves=[t.tensor(rows, INT64)]))
    weighted = t.view(t.op([t.mul(result, weights)], saves=[back]))
    y = t.cast(t.sum(weighted, tokens * width), x.item)
    t.hold(*([selected] if selected else []))
    return y


def _router(t: Tape, x: Tensor, width: int, count: int, top: int, normalised: bool) -> Tensor:
    """The weights of the chosen experts, fp32."""
    tokens = x.numel // width
    logits = t.cast(linear(t, x, width, count), FP32)
    indices = t.tensor(tokens * top, INT64)
    best = t.op([t.root(logits)], tokens * top, saves=[indices])
    if not normalised:
        return best
    total = t.tensor(tokens, FP32)
    return t.op([best], saves=[total], saves_out=True)


def _decoder(
    f: Fields,
    step: Step,
    a: Heads,
    block: Layer,
    *,
    bias: bool = False,
    out_bias: bool = False,
    head_norm: Layer | None = None,
    dense: Layer | None = None,
    is_sparse: frozenset[int] | None = None,
) -> Network:
    """Llama's layer with experts in place of the MLP, or with ``dense`` in the layers that are not sparse."""
    width = f.integer("hidden_size")

    def norm(t: Tape, x: Tensor) -> Tensor:
        return rms_norm(t, x, width)

    def with_mlp(inner: Layer) -> Layer:
        def layer(t: Tape, x: Tensor) -> Tensor:
            x = t.add(x, attention(t, step, norm(t, x), width, a, bias=bias, out_bias=out_bias, norm=head_norm))
            return t.add(x, inner(t, norm(t, x)))

        return layer

    kinds = {"experts": with_mlp(block), "dense": with_mlp(dense or block)}
    names = ["experts" if is_sparse is None or i in is_sparse else "dense" for i in range(f.layers())]
    layers = tuple((name, kinds[name]) for name in names)
    return network(f, step, kinds["experts"], norm, rope=a.dim, layers=layers)


def mixtral(f: Fields, step: Step) -> Network:
    width, ffn, count = f.integer("hidden_size"), f.integer("intermediate_size"), f.experts("num_local_experts")
    top = f.integer("num_experts_per_tok", 2)
    return _decoder(f, step, heads(f, kv=8), lambda t, x: experts(t, x, width, ffn, count, top, cast=False))


def olmoe(f: Fields, step: Step) -> Network:
    """A norm over all queries and all keys together."""
    width, ffn, count = f.integer("hidden_size"), f.integer("intermediate_size"), f.experts("num_experts")
    top, normalised, bias = (
        f.integer("num_experts_per_tok", 8),
        f.flag("norm_topk_prob", False),
        f.flag("attention_bias", False),
    )
    return _decoder(
        f,
        step,
        heads(f),
        lambda t, x: experts(t, x, width, ffn, count, top, normalised),
        bias=bias,
        out_bias=bias,
        head_norm=lambda t, x: rms_norm(t, x, x.numel // step.tokens),
    )


def qwen2_moe(f: Fields, step: Step) -> Network:
    """Experts, and one shared expert behind a gate of its own."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size", 5632), heads(f, kv=16)
    count, inner, top = (
        f.experts("num_experts"),
        f.integer("moe_intermediate_size"),
        f.integer("num_experts_per_tok", 4),
    )
    shared, normalised = f.integer("shared_expert_intermediate_size"), f.flag("norm_topk_prob", False)

    def block(t: Tape, x: Tensor) -> Tensor:
        together = gated_mlp(t, x, width, shared, "silu")
        routed = experts(t, x, width, inner, count, top, normalised)
        gate = t.root(linear(t, x, width, 1))
        return t.add(routed, t.mul(gate, together))

    return _decoder(
        f,
        step,
        a,
        block,
        bias=f.flag("qkv_bias", True),
        is_sparse=_sparse_layers(f),
        dense=lambda t, x: gated_mlp(t, x, width, ffn, "silu"),
    )


def qwen3_moe(f: Fields, step: Step) -> Network:
    """Experts without a shared one; a norm over each query and key head."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size", 6144), heads(f, kv=4)
    count, inner, top = (
        f.experts("num_experts"),
        f.integer("moe_intermediate_size"),
        f.integer("num_experts_per_tok", 8),
    )
    normalised, bias = f.flag("norm_topk_prob", False), f.flag("attention_bias", False)
    return _decoder(
        f,
        step,
        a,
        lambda t, x: experts(t, x, width, inner, count, top, normalised),
        bias=bias,
        out_bias=bias,
        head_norm=lambda t, x: rms_norm(t, x, a.dim),
        is_sparse=_sparse_layers(f),
        dense=lambda t, x: gated_mlp(t, x, width, ffn, "silu"),
    )


def _sparse_layers(f: Fields) -> frozenset[int]:
    has_experts = sparse(f)
    return frozenset(i for i in range(f.layers()) if has_experts(i))
