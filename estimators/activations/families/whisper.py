"""Whisper. Source: transformers' modeling_whisper.py."""

from __future__ import annotations

from estimators.activations.blocks import attend, layer_norm
from estimators.activations.chain import Layer, Network, alike
from estimators.activations.head import loss
from estimators.activations.linear import linear
from estimators.activations.op import INT64, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields
from estimators.models.families.parts import Heads


def _attended(t: Tape, step: Step, x: Tensor, memory: Tensor, width: int, n: int) -> Tensor:
    """Queries of ``x``, keys and values of ``memory``, all laid out head by head. Keys have no bias."""
    q = t.copy(t.copy(linear(t, x, width, width, True, "q_proj")))  # scaled, then laid out
    k = t.copy(linear(t, memory, width, width, name="k_proj"))
    v = t.copy(linear(t, memory, width, width, True, "v_proj"))
    over = memory.numel // width // step.batch
    return linear(
        t,
        attend(t, step, q, k, v, Heads(n, n, width // n), over=over, relaid=True, plain=True),
        width,
        width,
        bias=True,
    )


def whisper(f: Fields, step: Step) -> Network:
    """The encoder always sees ``max_source_positions`` frames (30 seconds); a sequence is the decoder's."""
    width, vocab, act = f.integer("d_model"), f.integer("vocab_size"), f.text("activation_function", "gelu")
    frames, mel = f.integer("max_source_positions", 1500), f.integer("num_mel_bins", 80)
    positions = f.integer("max_target_positions", 448)
    p, inner_p = f.share("dropout", 0.0), f.share("activation_dropout", 0.0)
    heard = step._replace(seq=frames)
    if f.share("attention_dropout", 0.0) or f.share("encoder_layerdrop", 0.0) or f.share("decoder_layerdrop", 0.0):
        raise KeyError("attention_dropout or layerdrop")

    def convolved(t: Tape, x: Tensor, channels: int, stride: int) -> Tensor:
        """Kernels of 3 over time, then the nonlinearity."""
        x, matrix = t.cast(x, t.mm), channels * 3 * width
        copies = [t.tensor(matrix, t.mm)] if t.mm != t.item else []
        y = t.op(
            [x],
            x.numel // channels // stride * width,
            t.mm,
            saves=[x, *copies] if t.trains else [],
            gradients=(matrix + width) * t.item * t.trains,
        )
        return t.op([y], saves=[y])

    def listen(t: Tape) -> Tensor:
        heard = t.tensor(step.batch * mel * 2 * frames, t.mm)
        x = convolved(t, convolved(t, heard, mel, 1), width, 2)
        return t.dropout(t.op([x], item=t.item), p)  # plus the positions

    def feed_forward(t: Tape, x: Tensor, ffn: int) -> Tensor:
        y = t.activation(linear(t, layer_norm(t, x, width), width, ffn, bias=True), act)
        return t.add(x, t.dropout(linear(t, t.dropout(y, inner_p), ffn, width, bias=True), p))

    def layer(side: str, at: Step, *, cross: bool) -> Layer:
        n, ffn = f.integer(f"{side}_attention_heads"), f.integer(f"{side}_ffn_dim")

        def one(t: Tape, x: Tensor) -> Tensor:
            y = layer_norm(t, x, width)
            x = t.add(x, t.dropout(_attended(t, at, y, y, width, n), p))
            if cross:
                y = _attended(t, at, layer_norm(t, x, width), t.shared["memory"], width, n)
                x = t.add(x, t.dropout(y, p))
            return feed_forward(t, x, ffn)

        return one

    def embed(t: Tape) -> Tensor:
        words = t.embedding(step.tokens, vocab, width, tied=f.flag("tie_word_embeddings", True))
        places = t.op(
            [t.tensor(0)],
            step.tokens * width,
            saves=[t.tensor(step.tokens, INT64)] * t.trains,
            gradients=positions * width * t.item * t.trains,
        )
        return t.dropout(t.add(words, places), p)

    def head(t: Tape, x: Tensor) -> Tensor:
        return loss(t, step, layer_norm(t, x, width), width, vocab, upcast=False)

    encoder = Network(
        listen,
        alike(layer("encoder", heard, cross=False), f.layers("encoder_layers"), "encoder"),
        lambda t, x: layer_norm(t, x, width),
    )
    return Network(embed, alike(layer("decoder", step, cross=True), f.layers("decoder_layers")), head, encoder=encoder)
