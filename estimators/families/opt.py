"""OPT. Source: transformers' modeling_opt.py."""

from __future__ import annotations

from estimators.families.parts import Shapes, linear, norm
from estimators.fields import Fields

#: transformers' OPTLearnedPositionalEmbedding keeps two rows before position 0.
_POSITION_OFFSET = 2


def opt(f: Fields) -> Shapes:
    """Learned positions; in the 350M model an embedding narrower than the layers, and no last norm."""
    width, ffn, vocab = f.integer("hidden_size"), f.integer("ffn_dim"), f.integer("vocab_size")
    narrow = f.optional("word_embed_proj_dim") or width
    bias, affine = f.flag("enable_bias", True), f.flag("layer_norm_elementwise_affine", True)
    name = "model.decoder"
    yield f"{name}.embed_tokens.weight", (vocab, narrow)
    yield f"{name}.embed_positions.weight", (f.integer("max_position_embeddings", 2048) + _POSITION_OFFSET, width)
    if narrow != width:
        yield from linear(f"{name}.project_out", narrow, width)
        yield from linear(f"{name}.project_in", width, narrow)
    if f.flag("do_layer_norm_before", True) and not f.flag("_remove_final_layer_norm", False) and affine:
        yield from norm(f"{name}.final_layer_norm", width, bias=True)
    for i in range(f.layers()):
        layer = f"{name}.layers.{i}"
        for which in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{which}", width, width, bias)
        yield from linear(f"{layer}.fc1", ffn, width, bias)
        yield from linear(f"{layer}.fc2", width, ffn, bias)
        for which in ("self_attn_layer_norm", "final_layer_norm") if affine else ():
            yield from norm(f"{layer}.{which}", width, bias=True)
    if not f.flag("tie_word_embeddings", True):
        yield "lm_head.weight", (vocab, narrow)
