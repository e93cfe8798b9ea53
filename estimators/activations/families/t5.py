"""T5, with source and target of equal length. Source: transformers' modeling_t5.py."""

from __future__ import annotations

from estimators.activations.chain import Layer, Network
from estimators.activations.head import loss
from estimators.activations.linear import linear
from estimators.activations.op import FP32, INT64, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields


def _norm(t: Tape, x: Tensor, width: int) -> Tensor:
    """T5LayerNorm: the root mean square in fp32; ``x`` itself is converted only by the product with it."""
    wide = t.cast(x, FP32)
    scale = t.root(t.copy(t.mean(t.square(wide), width)))
    return t.weighted(t.cast(t.mul(x, scale), x.item), width)


def _scores(t: Tape, step: Step, n: int) -> int:
    return step.batch * n * step.seq**2


def _eager(
    t: Tape, step: Step, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, n: int, p: float, masked: bool, cross: bool
) -> Tensor:
    """Copies of q, k and v laid out for a batched product; the bias is added, the softmax in the scores' dtype."""
    q, k, v = (t.copy(x) for x in (q, k, v))
    scores = t.copy(t.op([q, k], _scores(t, step, n), saves=[q, k], product=True))
    scores = t.op([scores, bias], alias=True)
    if masked:
        scores = t.op([scores, t.shared["mask"]])
    probabilities = t.dropout(t.root(scores), p)
    return t.copy(t.op([probabilities, v], q.numel, saves=[probabilities, v], product=True))


def _fused(
    t: Tape, step: Step, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, n: int, p: float, masked: bool, cross: bool
) -> Tensor:
    """The bias, laid out for the kernel (and masked in the decoder), needs a gradient of every score: a GPU has the
    memory-efficient kernel for that. A CPU has no fused kernel, and computes in fp32 what ``_eager`` does. Attention to
    the source (``cross``) has zeros in its place, which lie as they should."""
    laid = bias if cross else t.op([bias], saves=[t.tensor(step.seq**2, 1)] if masked else [])
    if not t.cpu:
        beside = t.tensor(step.tokens * n, FP32)
        return t.op(
            [q, k, v, laid],
            q.numel,
            saves=[q, k, v, laid, beside],
            saves_out=True,
            product=True,
            beside=[beside],
            backward_tmp=_scores(t, step, n) * t.item,
        )
    wide = t.cast(laid, FP32)
    q, k, v = (t.cast(x, FP32) for x in (q, k, v))
    q, k, v = t.copy(t.copy(q)), t.copy(t.copy(k)), t.copy(v)
    scores = t.op([q, k], _scores(t, step, n), saves=[q, k], product=True)
    probabilities = t.dropout(t.root(t.op([scores, wide], alias=True)), p)
    result = t.op([probabilities, v], q.numel, saves=[probabilities, v], product=True)
    return t.copy(t.cast(result, t.item))


def t5(f: Fields, step: Step) -> Network:
    width, ffn, n, vocab = f.integer("d_model"), f.integer("d_ff"), f.integer("num_heads"), f.integer("vocab_size")
    inner, buckets = n * f.integer("d_kv"), f.integer("relative_attention_num_buckets", 32)
    kind, p = f.text("feed_forward_proj", "relu"), f.share("dropout_rate", 0.1)
    act = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    attend = _eager if step.attention == "eager" else _fused
    if step.attention == "flash":
        raise KeyError("flash attention")

    def attended(t: Tape, x: Tensor, source: Tensor, bias: Tensor, masked: bool) -> Tensor:
        q, k, v = (linear(t, y, width, inner) for y in (x, source, source))
        return t.dropout(linear(t, attend(t, step, q, k, v, bias, n, p, masked, source is not x), inner, width), p)

    def feed_forward(t: Tape, x: Tensor) -> Tensor:
        y = _norm(t, x, width)
        z = t.activation(linear(t, y, width, ffn), act)
        if kind.startswith("gated-"):
            z = t.mul(z, linear(t, y, width, ffn))
        return t.add(x, t.dropout(linear(t, t.dropout(z, p), ffn, width), p))

    def positions(t: Tape) -> Tensor:
        """A bias for each head and distance, from a table of buckets: the same in every layer of a stack."""
        ids = t.tensor(step.seq**2, INT64)
        return t.op(
            [t.tensor(0)],
            n * step.seq**2,
            t.item,
            saves=[ids] if t.trains else [],
            forward_tmp=3 * ids.nbytes,
            gradients=buckets * n * t.item * t.trains,
        )

    def block(side: str, *, first: bool, cross: bool) -> Layer:
        def one(t: Tape, x: Tensor) -> Tensor:
            if first:
                t.shares[side] = positions(t)
            bias = t.shares[side] if first else t.shared[side]
            y = _norm(t, x, width)
            x = t.add(x, attended(t, y, y, bias, masked=cross))
            if cross:
                if first:
                    # Zeros, which checkpointing tells to require a gradient.
                    t.shares["cross"] = t.op([t.tensor(0)], n * step.seq**2, t.item)
                    t.shares["cross"].requires = t.input_gradients
                zeros = t.shares["cross"] if first else t.shared["cross"]
                x = t.add(x, attended(t, _norm(t, x, width), t.shared["memory"], zeros, masked=False))
            return feed_forward(t, x)

        return one

    def stack(side: str, count: int, *, cross: bool) -> tuple[tuple[str, Layer], ...]:
        kinds = [
            (f"{side}-{'first' if first else 'next'}", block(side, first=first, cross=cross)) for first in (True, False)
        ]
        return tuple(kinds[i > 0] for i in range(count))

    def embed(t: Tape) -> Tensor:
        return t.dropout(t.embedding(step.tokens, vocab, width, tied=True), p)

    def decoded(t: Tape) -> Tensor:
        if attend is _eager:
            t.shares["mask"] = t.tensor(step.batch * step.seq**2)
        return embed(t)

    def final_norm(t: Tape, x: Tensor) -> Tensor:
        return t.dropout(_norm(t, x, width), p)

    def head(t: Tape, x: Tensor) -> Tensor:
        x = final_norm(t, x)
        return loss(t, step, t.copy(x) if f.flag("tie_word_embeddings", True) else x, width, vocab, upcast=False)

    layers = f.layers("num_layers")
    decoders = layers if f.optional("num_decoder_layers") is None else f.layers("num_decoder_layers")
    return Network(
        decoded,
        stack("decoder", decoders, cross=True),
        head,
        encoder=Network(embed, stack("encoder", layers, cross=False), final_norm),
    )
