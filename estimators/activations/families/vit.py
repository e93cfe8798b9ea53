"""ViT with an image-classification head. Source: transformers' modeling_vit.py."""

from __future__ import annotations

from estimators.activations.blocks import attention, layer_norm
from estimators.activations.chain import Network, alike
from estimators.activations.linear import linear
from estimators.activations.op import Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields
from estimators.models.families.parts import Heads


def vit(f: Fields, step: Step) -> Network:
    """The length of a sequence is the number of patches and one more, whatever was asked for."""
    width, ffn, patch = f.integer("hidden_size"), f.integer("intermediate_size"), f.integer("patch_size", 16)
    side, channels, n = f.integer("image_size", 224), f.integer("num_channels", 3), f.integer("num_attention_heads")
    a, bias, p = Heads(n, n, width // n), f.flag("qkv_bias", True), f.share("hidden_dropout_prob", 0.0)
    step = step._replace(seq=(side // patch) ** 2 + 1)
    labels = f.entries("id2label", f.integer("num_labels", 2, least=0))

    def embed(t: Tape) -> Tensor:
        pixels = t.tensor(step.batch * channels * side * side, t.mm)
        matrix = width * channels * patch * patch
        copies = [t.tensor(matrix, t.mm)] if t.mm != t.item else []
        patches = t.op(
            [],
            (step.seq - 1) * step.batch * width,
            t.mm,
            saves=[pixels, *copies] if t.trains else [],
            gradients=matrix * t.item * t.trains,
        )
        x = t.op([t.copy(patches)], step.tokens * width, t.item, gradients=step.seq * width * t.item * t.trains)
        return t.dropout(x, p)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = attention(t, step, layer_norm(t, x, width), width, a, bias=bias, out_bias=True, rope=False)
        x = t.add(x, t.dropout(y, p))
        inner = t.activation(linear(t, layer_norm(t, x, width), width, ffn, bias=True), f.text("hidden_act", "gelu"))
        return t.add(x, t.dropout(linear(t, inner, ffn, width, bias=True), p))

    def head(t: Tape, x: Tensor) -> Tensor:
        # The first token is a view: the whole normalised sequence is kept with it.
        x = layer_norm(t, x, width)
        rows = max(labels, 1)
        if t.mm != t.item:
            x = t.op([x], step.batch * width, t.mm)
        logits = t.op([x], step.batch * rows, t.mm, saves=[x], gradients=(width + 1) * rows * t.item)
        probabilities = t.op([logits], saves_out=True)
        return t.op([probabilities], 1, saves=[probabilities])

    return Network(embed, alike(layer, f.layers()), head)
