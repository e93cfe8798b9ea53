"""T5 and its successors. Source: transformers' modeling_t5.py, where the head is always the shared embedding."""

from __future__ import annotations

from estimators.models.config_fields import Fields
from estimators.models.families.parts import Shapes, linear, norm


def _stack(f: Fields, prefix: str, layers: int, cross: bool) -> Shapes:
    """One side: self-attention with relative positions in the first block, cross-attention on the decoder's side."""
    width, ffn, n = f.integer("d_model"), f.integer("d_ff"), f.integer("num_heads")
    inner, buckets = n * f.integer("d_kv"), f.integer("relative_attention_num_buckets", 32)
    inputs = ("wi_0", "wi_1") if f.text("feed_forward_proj", "relu").startswith("gated-") else ("wi",)
    attentions = ("SelfAttention", "EncDecAttention") if cross else ("SelfAttention",)
    for i in range(layers):
        name = f"{prefix}.block.{i}.layer"
        for j, attention in enumerate(attentions):
            for which in ("q", "k", "v"):
                yield from linear(f"{name}.{j}.{attention}.{which}", inner, width)
            yield from linear(f"{name}.{j}.{attention}.o", width, inner)
            if i == 0 and j == 0:
                yield f"{name}.0.SelfAttention.relative_attention_bias.weight", (buckets, n)
            yield from norm(f"{name}.{j}.layer_norm", width)
        last = f"{name}.{len(attentions)}"
        for which in inputs:
            yield from linear(f"{last}.DenseReluDense.{which}", ffn, width)
        yield from linear(f"{last}.DenseReluDense.wo", width, ffn)
        yield from norm(f"{last}.layer_norm", width)
    yield from norm(f"{prefix}.final_layer_norm", width)


def t5(f: Fields) -> Shapes:
    layers = f.layers("num_layers")
    decoder_layers = layers if f.optional("num_decoder_layers") is None else f.layers("num_decoder_layers")
    yield "shared.weight", (f.integer("vocab_size"), f.integer("d_model"))
    yield from _stack(f, "encoder", layers, cross=False)
    yield from _stack(f, "decoder", decoder_layers, cross=True)
