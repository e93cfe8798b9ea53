"""The pieces that families are made of. Each yields ``(name, shape)`` under transformers' names."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string, which
# takes a millisecond per class, and the calculator has to answer at once.

from collections.abc import Callable, Iterator
from typing import NamedTuple

from estimators.errors import InputError
from estimators.models.config_fields import Fields

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def linear(name: str, rows: int, cols: int, bias: bool = False) -> Shapes:
    """torch.nn.Linear(cols, rows)."""
    yield f"{name}.weight", (rows, cols)
    if bias:
        yield f"{name}.bias", (rows,)


def norm(name: str, width: int, bias: bool = False) -> Shapes:
    """RMSNorm, or LayerNorm with ``bias``."""
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


class Heads(NamedTuple):
    """Query heads, key and value heads, elements of one head."""

    n: int
    kv: int
    dim: int


def heads(f: Fields, *, n: int | None = None, kv: int | None = None, dim: int | None = None) -> Heads:
    """Heads from the usual fields. The arguments are the defaults of the configuration class; no key and value heads
    means as many as query heads, no ``head_dim`` the width divided by the query heads."""
    count = f.integer("num_attention_heads", n) if n else f.integer("num_attention_heads")
    kv_heads = f.optional("num_key_value_heads", kv) or count
    if count % kv_heads:
        raise InputError(f"{f.source}: num_attention_heads={count} is not a multiple of num_key_value_heads={kv_heads}")
    return Heads(count, kv_heads, f.optional("head_dim", dim) or f.divide("hidden_size", "num_attention_heads"))


def attention(
    name: str, width: int, a: Heads, bias: bool = False, out_bias: bool = False, out: str = "o_proj"
) -> Shapes:
    """Separate query, key, value and output projections."""
    yield from linear(f"{name}.q_proj", a.n * a.dim, width, bias)
    yield from linear(f"{name}.k_proj", a.kv * a.dim, width, bias)
    yield from linear(f"{name}.v_proj", a.kv * a.dim, width, bias)
    yield from linear(f"{name}.{out}", width, a.n * a.dim, out_bias)


def gated_mlp(name: str, width: int, ffn: int, bias: bool = False) -> Shapes:
    """SwiGLU or GeGLU with separate gate and up projections."""
    yield from linear(f"{name}.gate_proj", ffn, width, bias)
    yield from linear(f"{name}.up_proj", ffn, width, bias)
    yield from linear(f"{name}.down_proj", width, ffn, bias)


def experts(name: str, count: int, width: int, ffn: int) -> Shapes:
    """A router and experts stacked into 3-D parameters, as transformers 5 stores them."""
    yield f"{name}.gate.weight", (count, width)
    yield f"{name}.experts.gate_up_proj", (count, 2 * ffn, width)
    yield f"{name}.experts.down_proj", (count, width, ffn)


def decoder(
    f: Fields,
    layer: Callable[[str, int], Shapes],
    *,
    tied: bool = False,
    vocab: int | None = None,
    norm_bias: bool = False,
    final: str = "norm",
    head_bias: bool = False,
) -> Shapes:
    """Embedding, layers, a last norm and the language model's head, which a tied model shares with the embedding.

    ``layer(name, i)`` yields layer ``i``; ``tied`` is the default of ``tie_word_embeddings``; ``final`` is the name
    of the last norm, empty for one without parameters.
    """
    width = f.integer("hidden_size")
    rows = f.integer("vocab_size", vocab) if vocab else f.integer("vocab_size")
    yield "model.embed_tokens.weight", (rows, width)
    for i in range(f.layers()):
        yield from layer(f"model.layers.{i}", i)
    if final:
        yield from norm(f"model.{final}", width, norm_bias)
    if not f.flag("tie_word_embeddings", tied):
        yield "lm_head.weight", (rows, width)
    if head_bias:
        yield "lm_head.bias", (rows,)
