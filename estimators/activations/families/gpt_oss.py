"""GPT-OSS. Source: transformers' modeling_gpt_oss.py, with integrations/moe.py's ``grouped_mm`` experts."""

from __future__ import annotations

from estimators.activations.blocks import attend, rms_norm_fp32
from estimators.activations.chain import Network, alike
from estimators.activations.families.llama import network
from estimators.activations.families.moe import dispatched
from estimators.activations.linear import linear
from estimators.activations.op import INT64, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields
from estimators.models.families.parts import heads


def gpt_oss(f: Fields, step: Step) -> Network:
    """A learned sink beside the scores of each head: transformers computes it eagerly, or by a flash kernel with sinks
    (``flash``); it has no ``sdpa``."""
    width, inner, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=8, dim=64)
    count, top = f.experts("num_local_experts"), f.integer("num_experts_per_tok", 4)
    bias = f.flag("attention_bias", True)
    tokens, rows, eager = step.tokens, step.tokens * top, step.attention != "flash"
    if f.share("attention_dropout", 0.0):
        raise KeyError("attention_dropout")

    def turned(t: Tape, x: Tensor) -> Tensor:
        """Both halves by half a table, then concatenated."""
        halves = [t.add(t.op([x], x.numel // 2), t.op([x], x.numel // 2)) for _ in range(2)]
        return t.op(halves, x.numel)

    def attended(t: Tape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.copy(x, tokens * a.n * a.dim) for x in (q, k, v))
        numel, queries = tokens * a.n * step.seq, tokens * a.n
        scores = t.copy(t.copy(t.op([q, k], numel, saves=[q, k], product=True)))  # scaled, and with the mask
        joined = t.op([scores], numel + queries, gradients=a.n * t.item * t.trains)
        largest = t.op([joined], queries, saves=[t.tensor(queries, INT64)])
        probabilities = t.root(t.op([joined, largest], alias=True))  # of which the sinks' column is left out, as a view
        out = t.op([probabilities, v], q.numel, saves=[probabilities, v], product=True, backward_tmp=numel * t.item)
        return t.copy(out)

    def gated(t: Tape, both: Tensor) -> Tensor:
        """``(clamp(up) + 1) * clamp(gate) * sigmoid(alpha * gate)`` of every second column each."""
        gate, up = (t.op([both], both.numel // 2, saves=[both]) for _ in range(2))
        glu = t.mul(gate, t.root(t.copy(gate)))
        product = t.mul(t.op([up], alias=True), glu)
        t.hold(up)
        return product

    def experts(t: Tape, x: Tensor) -> Tensor:
        logits = linear(t, x, width, count, bias=True)
        weights = t.root(t.op([logits], rows, saves=[t.tensor(rows, INT64)]))
        expert = t.tensor(rows, INT64)

        def biases(each: int) -> Tensor:
            """Rows of a table."""
            nbytes = count * each * t.item * t.trains
            return t.op([t.tensor(0)], rows * each, t.item, saves=[expert] * t.trains, gradients=nbytes)

        y = dispatched(t, x, weights, width, inner, count, top, gated, biases)
        t.hold(logits)
        return y

    def norm(t: Tape, x: Tensor) -> Tensor:
        return rms_norm_fp32(t, x, width)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = norm(t, x)
        q, k, v = (linear(t, y, width, n * a.dim, bias) for n in (a.n, a.kv, a.kv))
        q, k = turned(t, q), turned(t, k)
        y = attended(t, q, k, v) if eager else attend(t, step, q, k, v, a)
        x = t.add(x, linear(t, y, a.n * a.dim, width, bias))
        return t.add(x, experts(t, norm(t, x)))

    return network(f, step, layer, norm, rope=a.dim // 2, layers=alike(layer, f.layers()))
