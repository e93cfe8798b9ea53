"""GPT-2, GPT-BigCode, GPT-J, GPT-NeoX and Pythia, BLOOM, OPT, Phi 1 and 2, StarCoder 2: layers with a plain MLP.
Source: transformers' modeling file of each ``model_type``."""

from __future__ import annotations

from collections.abc import Callable

from estimators.models.config_fields import Fields
from estimators.models.families.parts import Shapes, attention, decoder, heads, linear, norm


def conv1d(name: str, rows: int, cols: int) -> Shapes:
    """transformers' Conv1D(rows, cols): a linear layer whose weight is stored input first."""
    yield f"{name}.weight", (cols, rows)
    yield f"{name}.bias", (rows,)


def _biased(name: str, rows: int, cols: int) -> Shapes:
    return linear(name, rows, cols, bias=True)


def _gpt2(f: Fields, kv: int, matrix: Callable[[str, int, int], Shapes]) -> Shapes:
    """``kv`` is how many elements of keys and values together follow the queries in ``c_attn``."""
    width, vocab = f.integer("n_embd"), f.integer("vocab_size")
    ffn = f.optional("n_inner") or 4 * width
    yield "transformer.wte.weight", (vocab, width)
    yield "transformer.wpe.weight", (f.integer("n_positions", 1024), width)
    for i in range(f.layers("n_layer")):
        name = f"transformer.h.{i}"
        yield from norm(f"{name}.ln_1", width, bias=True)
        yield from matrix(f"{name}.attn.c_attn", width + kv, width)
        yield from matrix(f"{name}.attn.c_proj", width, width)
        yield from norm(f"{name}.ln_2", width, bias=True)
        yield from matrix(f"{name}.mlp.c_fc", ffn, width)
        yield from matrix(f"{name}.mlp.c_proj", width, ffn)
    yield from norm("transformer.ln_f", width, bias=True)
    if not f.flag("tie_word_embeddings", True):
        yield "lm_head.weight", (vocab, width)


def gpt2(f: Fields) -> Shapes:
    f.divide("n_embd", "n_head")
    return _gpt2(f, 2 * f.integer("n_embd"), conv1d)


def gpt_bigcode_buffers(f: Fields) -> int:
    """Bytes of the causal mask over all positions, one for all layers."""
    return f.integer("n_positions", 1024) ** 2


def gpt_bigcode(f: Fields) -> Shapes:
    """One key and value head with ``multi_query``."""
    kv = f.divide("n_embd", "n_head") if f.flag("multi_query", True) else f.integer("n_embd")
    return _gpt2(f, 2 * kv, _biased)


def gptj(f: Fields) -> Shapes:
    """Attention and MLP side by side under one norm, a head with a bias."""
    width, vocab = f.integer("n_embd"), f.integer("vocab_size")
    ffn = f.optional("n_inner") or 4 * width
    yield "transformer.wte.weight", (vocab, width)
    for i in range(f.layers("n_layer")):
        name = f"transformer.h.{i}"
        yield from norm(f"{name}.ln_1", width, bias=True)
        for which in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{name}.attn.{which}", width, width)
        yield from linear(f"{name}.mlp.fc_in", ffn, width, bias=True)
        yield from linear(f"{name}.mlp.fc_out", width, ffn, bias=True)
    yield from norm("transformer.ln_f", width, bias=True)
    if not f.flag("tie_word_embeddings", False):
        yield "lm_head.weight", (vocab, width)
    yield "lm_head.bias", (vocab,)


def gpt_neox(f: Fields) -> Shapes:
    width, ffn, vocab = f.integer("hidden_size"), f.integer("intermediate_size"), f.integer("vocab_size")
    bias = f.flag("attention_bias", True)
    yield "gpt_neox.embed_in.weight", (vocab, width)
    for i in range(f.layers()):
        name = f"gpt_neox.layers.{i}"
        yield from norm(f"{name}.input_layernorm", width, bias=True)
        yield from norm(f"{name}.post_attention_layernorm", width, bias=True)
        yield from linear(f"{name}.attention.query_key_value", 3 * width, width, bias)
        yield from linear(f"{name}.attention.dense", width, width, bias)
        yield from linear(f"{name}.mlp.dense_h_to_4h", ffn, width, bias=True)
        yield from linear(f"{name}.mlp.dense_4h_to_h", width, ffn, bias=True)
    yield from norm("gpt_neox.final_layer_norm", width, bias=True)
    if not f.flag("tie_word_embeddings", False):
        yield "lm_head.weight", (vocab, width)


def bloom(f: Fields) -> Shapes:
    """A norm on the embedding, query, key and value in one matrix, a tied head. Older files call the width n_embed."""
    old = f.optional("n_embed")
    width, vocab = old or f.integer("hidden_size"), f.integer("vocab_size")
    yield "transformer.word_embeddings.weight", (vocab, width)
    yield from norm("transformer.word_embeddings_layernorm", width, bias=True)
    for i in range(f.layers("n_layer")):
        name = f"transformer.h.{i}"
        yield from norm(f"{name}.input_layernorm", width, bias=True)
        yield from linear(f"{name}.self_attention.query_key_value", 3 * width, width, bias=True)
        yield from linear(f"{name}.self_attention.dense", width, width, bias=True)
        yield from norm(f"{name}.post_attention_layernorm", width, bias=True)
        yield from linear(f"{name}.mlp.dense_h_to_4h", 4 * width, width, bias=True)
        yield from linear(f"{name}.mlp.dense_4h_to_h", width, 4 * width, bias=True)
    yield from norm("transformer.ln_f", width, bias=True)
    if not f.flag("tie_word_embeddings", True):
        yield "lm_head.weight", (vocab, width)


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


def phi(f: Fields) -> Shapes:
    """Attention and MLP side by side under one norm; biases everywhere, the head included."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    qk_norm = f.flag("qk_layernorm", False)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias=True, out_bias=True, out="dense")
        for which in ("q_layernorm", "k_layernorm") if qk_norm else ():
            yield from norm(f"{name}.self_attn.{which}", width // a.n, bias=True)
        yield from linear(f"{name}.mlp.fc1", ffn, width, bias=True)
        yield from linear(f"{name}.mlp.fc2", width, ffn, bias=True)
        yield from norm(f"{name}.input_layernorm", width, bias=True)

    return decoder(f, layer, norm_bias=True, final="final_layernorm", head_bias=True)


def starcoder2(f: Fields) -> Shapes:
    """A plain MLP, LayerNorm, biases everywhere, a tied embedding."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=2)
    bias = f.flag("use_bias", True)

    def layer(name: str, i: int) -> Shapes:
        yield from attention(f"{name}.self_attn", width, a, bias, out_bias=bias)
        yield from linear(f"{name}.mlp.c_fc", ffn, width, bias)
        yield from linear(f"{name}.mlp.c_proj", width, ffn, bias)
        yield from norm(f"{name}.input_layernorm", width, bias=True)
        yield from norm(f"{name}.post_attention_layernorm", width, bias=True)

    return decoder(f, layer, tied=True, norm_bias=True)
