"""GPT-2 and GPT-BigCode. Source: transformers' modeling_gpt2.py and modeling_gpt_bigcode.py."""

from __future__ import annotations

from collections.abc import Callable

from estimators.families.parts import Shapes, linear, norm
from estimators.fields import Fields


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
