"""What layers are made of, as transformers writes them: norms, positions, attention, MLPs."""

from __future__ import annotations

from estimators.activations.chain import Layer
from estimators.activations.linear import linear
from estimators.activations.op import FP32, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.errors import InputError
from estimators.models.families.parts import Heads

# Norms ---------------------------------------------------------------------------------------------------------


def _normalised(t: Tape, x: Tensor, width: int) -> Tensor:
    """``x / rms(x)`` in fp32."""
    x = t.cast(x, FP32)
    scale = t.root(t.copy(t.mean(t.square(x), width)))
    return t.mul(x, scale)


def rms_norm(t: Tape, x: Tensor, width: int) -> Tensor:
    """LlamaRMSNorm: back to the weights' dtype, then times the weight."""
    normalised = _normalised(t, x, width)
    y = t.weighted(t.cast(normalised, x.item), width)
    t.hold(normalised)
    return y


def rms_norm_fp32(t: Tape, x: Tensor, width: int) -> Tensor:
    """Olmo2RMSNorm: times the weight in fp32, then back."""
    return t.cast(t.weighted(_normalised(t, x, width), width, FP32), x.item)


def gemma_norm(t: Tape, x: Tensor, width: int) -> Tensor:
    """GemmaRMSNorm: times ``1 + weight.float()``, then back."""
    y = _normalised(t, x, width)
    return t.cast(_times_fp32_weight(t, y, width), x.item)


def cohere_norm(t: Tape, x: Tensor, width: int) -> Tensor:
    """CohereLayerNorm: ``x - mean`` is computed twice, once for the variance."""
    item, x = x.item, t.cast(x, FP32)
    mean = t.mean(x, width)
    scale = t.root(t.copy(t.mean(t.square(t.add(x, mean)), width)))
    return t.cast(_times_fp32_weight(t, t.mul(t.add(x, mean), scale), width), item)


def _times_fp32_weight(t: Tape, y: Tensor, width: int) -> Tensor:
    p, weight = t.parameter((width,)), t.tensor(width, FP32)
    saves = [*([y] if p.trains else []), *([weight] if y.requires else [])]
    return t.op([y], saves=saves, gradients=width * p.item * p.trains, backward_tmp=y.nbytes * p.trains)


def layer_norm(t: Tape, x: Tensor, width: int, affine: int = 2) -> Tensor:
    """torch.nn.LayerNorm: its input and two statistics. ``affine``: how many vectors of parameters."""
    statistics = [t.tensor(x.numel // width, x.item) for _ in range(2)]
    p = t.parameter((width,)) if affine else None
    trained = p.item * (p.trains + (affine - 1) * p.bias_trains) if p else 0
    return t.op([x], saves=[x, *statistics], gradients=width * trained)


def plain_norm(t: Tape, x: Tensor, width: int) -> Tensor:
    """OlmoLayerNorm: LayerNorm in fp32 without parameters."""
    return t.cast(layer_norm(t, t.cast(x, FP32), width, affine=0), x.item)


# Attention -----------------------------------------------------------------------------------------------------


def rotated(t: Tape, x: Tensor, item: int = 0) -> Tensor:
    """``x * cos + rotate_half(x) * sin``; with fp32 tables (``item``), by way of fp32 and back."""
    wide = item or t.item
    y = t.add(t.op([x], item=wide), t.op([t.copy(x)], item=wide))
    return t.cast(y, x.item) if item else y


def split(step: Step, a: Heads) -> Heads:
    """This rank's heads."""
    for heads, whose in ((a.n, "heads"), (a.kv, "heads of keys and values")):
        if heads % step.tp:
            raise InputError(f"tp={step.tp} cuts attention by its heads, and {heads} {whose} are not a multiple of it")
    return a if step.tp == 1 else a._replace(n=a.n // step.tp, kv=a.kv // step.tp)


def attend(
    t: Tape,
    step: Step,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Heads,
    *,
    softcap: bool = False,
    relaid: bool = False,
    mask: int = 0,
    over: int = 0,
    plain: bool = False,
    drop: float = 0.0,
    narrow: str = "",
) -> Tensor:
    """Attention over one sequence with itself, or with ``over`` tokens of another one, unpadded; the result is laid out
    as the output projection reads it.
    Fused kernels lay it out as the queries are: ``relaid`` says that those are head by head, so that a copy is made.

    Fused kernels (``sdpa``, ``flash``) save what they read, their result and one fp32 number per query; a boolean mask
    (``mask``: its elements, 0 for none) is converted to the weights' dtype for each call, and saved. ``sdpa`` has one
    where sequences are packed or longer than a window, and then repeats keys and values for every query head.
    ``eager`` saves the probabilities, in fp32 and in the weights' dtype, and copies of q, k and v laid out for a
    batched product, keys and values repeated for every query head. ``drop``: the probability of dropout on the
    probabilities, of which a fused kernel keeps a seed. ``narrow``: a softmax in the scores' dtype, as ``gpt2`` has it,
    or as ``bert``, without a mask. ``plain``: the same, and q, k and v are laid out already.
    """
    size = step.tokens * a.n * a.dim
    if step.attention != "eager":
        q, k, v = (t.cast(x, t.mm) for x in (q, k, v))
        mask = mask or t.mask
        if (step.expand or t.masked) and step.attention == "sdpa" and a.n != a.kv:
            k, v = t.copy(k, size), t.copy(v, size)
        result, added = t.tensor(step.tokens * a.n, FP32), [t.tensor(mask, t.mm)] if mask else []
        forward_tmp, backward_tmp = _ring(step, q, k)
        out = t.op(
            [q, k, v],
            size,
            t.mm,
            saves=[q, k, v, *added, result],
            saves_out=True,
            product=True,
            beside=[result],
            forward_tmp=forward_tmp,
            backward_tmp=backward_tmp,
        )
        return t.copy(out) if relaid else out
    numel = step.batch * a.n * step.seq * (over or step.seq)
    if plain:
        probabilities = t.root(t.copy(t.op([q, k], numel, saves=[q, k], product=True)))
        return t.copy(t.op([probabilities, v], size, saves=[probabilities, v], product=True))
    # Keys and values are repeated for every query head. For a batched product what is head by head is laid out anew,
    # unless there is one sequence, whose heads can be read where they lie.
    several, repeated = step.batch > 1, a.n != a.kv
    if repeated:
        k, v = t.copy(k, size), t.copy(v, size)
    made = [k, v] if repeated else []
    q = t.copy(q, size) if several else q
    k = t.copy(k, size) if several and not repeated else k
    asked = q.item  # of the probabilities
    q, k = t.cast(q, t.mm), t.cast(k, t.mm)
    scores = t.copy(t.op([q, k], numel, t.mm, saves=[q, k], product=True))
    if softcap:
        scores = t.copy(t.root(t.copy(scores)))
    if narrow != "bert":
        scores = t.op([scores], item=t.item)  # plus the mask
    # Both passes of the softmax are computed in fp32: on a CPU by way of copies; on a GPU the kernel converts as it
    # reads, and its backward pass multiplies the gradient by the result first (softmax_backward_cuda_out).
    if narrow:
        scores = t.cast(scores, FP32) if t.autocast and not t.cpu else scores
        softmax = t.op([scores], saves_out=True, backward_tmp=scores.nbytes * (not t.cpu))
        asked = softmax.item if narrow == "bert" else v.item
    else:
        wider = scores.numel * (FP32 - scores.item) * t.cpu
        product = scores.numel * FP32 * (not t.cpu)
        softmax = t.op([scores], item=FP32, saves_out=True, forward_tmp=wider, backward_tmp=wider + product)
    probabilities = t.dropout(t.cast(softmax, asked), drop)
    t.hold(scores)  # the variable is rebound when the probabilities are there
    t.held.append(probabilities)  # returned to the layer
    v = t.copy(v, size) if several and not repeated else v
    probabilities, v = t.cast(probabilities, t.mm), t.cast(v, t.mm)
    out = t.copy(t.op([probabilities, v], size, t.mm, saves=[probabilities, v], product=True))
    t.hold(*made)
    return out


def _ring(step: Step, q: Tensor, k: Tensor) -> tuple[int, int]:
    """What attention over the parts of ``cp`` ranks allocates and frees, forward and backward: keys and values
    of all of them, gathered, and this rank's beside them; the result and its gradients are summed in fp32. Source:
    torch/distributed/tensor/experimental/_context_parallel/_attention.py of torch 2.13."""
    if step.cp == 1:
        return 0, 0
    pairs, sums = 2 * k.nbytes * (step.cp + 1), FP32 * (q.numel + 2 * k.numel)
    # Gradients of one step of the ring, and those that go round it, twice.
    one_step, sent = sums * q.item // FP32, 2 * FP32 * 2 * k.numel
    return pairs + 2 * FP32 * q.numel, pairs + sums + one_step + sent


def attention(
    t: Tape,
    step: Step,
    x: Tensor,
    width: int,
    a: Heads,
    *,
    bias: bool = False,
    out_bias: bool = False,
    norm: Layer | None = None,
    rope: bool = True,
    table: int = 0,
    softcap: bool = False,
    partial: bool = False,
    drop: float = 0.0,
    narrow: str = "",
) -> Tensor:
    """Separate projections; ``norm`` is applied to queries and to keys, ``table`` the bytes of the tables of rotary
    positions where that is not the weights' dtype; ``partial``: rotated and other elements are concatenated."""
    given, x, a = x, t.gathered(x), split(step, a)
    q = linear(t, x, width, a.n * a.dim, bias)
    k = linear(t, x, width, a.kv * a.dim, bias)
    v = linear(t, x, width, a.kv * a.dim, bias)
    if norm:
        q, k = norm(t, q), norm(t, k)
    if rope:
        before = q, k
        q, k = rotated(t, q, table), rotated(t, k, table)
        t.hold(*before)
    y = attend(t, step, q, k, v, a, softcap=softcap, relaid=partial, drop=drop, narrow=narrow)
    out = t.scattered(linear(t, y, a.n * a.dim, width, out_bias))
    t.hold(given, x, q, k, v)
    return out


def fused_attention(
    t: Tape,
    step: Step,
    x: Tensor,
    width: int,
    a: Heads,
    *,
    bias: bool,
    out_bias: bool,
    rope: bool,
    drop: float = 0.0,
    narrow: str = "",
) -> Tensor:
    """Query, key and value in one matrix, of whose result they are views; with ``rope`` queries and keys are made anew,
    by concatenation."""
    x, a = t.gathered(x), split(step, a)
    qkv = linear(t, x, width, (a.n + 2 * a.kv) * a.dim, bias)
    q, k, v = qkv, qkv, qkv
    if rope:
        q = rotated(t, t.op([qkv], step.tokens * a.n * a.dim))
        k = rotated(t, t.op([qkv], step.tokens * a.kv * a.dim))
    y = attend(t, step, q, k, v, a, relaid=rope, drop=drop, narrow=narrow)
    return t.scattered(linear(t, y, a.n * a.dim, width, out_bias))


# MLPs ----------------------------------------------------------------------------------------------------------


def gated_mlp(t: Tape, x: Tensor, width: int, ffn: int, act: str, bias: bool = False, fused: bool = False) -> Tensor:
    """``down(act(gate(x)) * up(x))``; ``fused``: gate and up are halves of one result."""
    given, x, ffn = x, t.gathered(x), ffn // t.step.tp
    if fused:
        gate, up = t.halves(linear(t, x, width, 2 * ffn, bias))
        product = t.mul(t.activation(gate, act), up)
    else:
        activated = t.activation(linear(t, x, width, ffn, bias), act)
        product = t.mul(activated, linear(t, x, width, ffn, bias))
    out = t.scattered(linear(t, product, ffn, width, bias))
    t.hold(given, x)
    return out


def mlp(t: Tape, x: Tensor, width: int, ffn: int, act: str, bias: bool = True) -> Tensor:
    x, ffn = t.gathered(x), ffn // t.step.tp
    return t.scattered(linear(t, t.activation(linear(t, x, width, ffn, bias), act), ffn, width, bias))


# Both ends -----------------------------------------------------------------------------------------------------


def causal_mask(step: Step, masked: bool = False) -> int:
    """Bytes of the mask that eager attention adds to the scores, or of booleans, made once for all layers. ``masked``:
    there are tokens before it that a token does not see, in every sequence the same."""
    added = step.batch * step.seq**2 * step.item * (step.attention == "eager")
    return added + step.mask(masked or step.packed) // (1 if step.packed else step.batch)


def tables(step: Step, dim: int, item: int = 0) -> int:
    """Bytes of the cosines and sines of rotary positions."""
    return 2 * step.seq * dim * (item or step.item)
