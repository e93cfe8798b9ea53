"""Whisper. Source: transformers' modeling_whisper.py. The encoder's positions are sinusoids and do not train."""

from __future__ import annotations

from estimators.models.config_fields import Fields
from estimators.models.families.parts import Shapes, linear, norm


def _attention(name: str, width: int) -> Shapes:
    """Keys have no bias."""
    yield from linear(f"{name}.k_proj", width, width)
    for which in ("v_proj", "q_proj", "out_proj"):
        yield from linear(f"{name}.{which}", width, width, bias=True)
    yield from norm(f"{name}_layer_norm", width, bias=True)


def _stack(f: Fields, side: str, attentions: tuple[str, ...]) -> Shapes:
    width, ffn = f.integer("d_model"), f.integer(f"{side}_ffn_dim")
    f.divide("d_model", f"{side}_attention_heads")
    for i in range(f.layers(f"{side}_layers")):
        name = f"model.{side}.layers.{i}"
        for which in attentions:
            yield from _attention(f"{name}.{which}", width)
        yield from linear(f"{name}.fc1", ffn, width, bias=True)
        yield from linear(f"{name}.fc2", width, ffn, bias=True)
        yield from norm(f"{name}.final_layer_norm", width, bias=True)
    yield from norm(f"model.{side}.layer_norm", width, bias=True)


def whisper(f: Fields) -> Shapes:
    width, vocab = f.integer("d_model"), f.integer("vocab_size")
    for name, channels in (("conv1", f.integer("num_mel_bins", 80)), ("conv2", width)):
        yield f"model.encoder.{name}.weight", (width, channels, 3)
        yield f"model.encoder.{name}.bias", (width,)
    yield "model.encoder.embed_positions.weight", (f.integer("max_source_positions", 1500), width)
    yield from _stack(f, "encoder", ("self_attn",))
    yield "model.decoder.embed_tokens.weight", (vocab, width)
    yield "model.decoder.embed_positions.weight", (f.integer("max_target_positions", 448), width)
    yield from _stack(f, "decoder", ("self_attn", "encoder_attn"))
    if not f.flag("tie_word_embeddings", True):
        yield "proj_out.weight", (vocab, width)
