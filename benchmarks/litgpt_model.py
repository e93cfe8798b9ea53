"""LitGPT's model as the calculator sees it: the forward pass of litgpt/model.py and litgpt/lora.py of 2023 and 2024,
written down operation by operation, to hold the calculator against what LitGPT's pages say.

It is not transformers' Llama: queries, keys and values are one product, of which the value stays a view; adapters pad
their result by ``index_copy``, which saves its source; grouped keys and values are repeated; norms multiply in fp32;
logits are made in chunks of 128 tokens, all of which live in fp32 until the backward pass is over.

In 4 bits three more things live at the moment at which the head runs. Lightning's plugin quantises from fp16, so that a
decoded weight is fp16, and bf16 again where it is multiplied. bitsandbytes before 0.43.2 keeps the input of a product
as an attribute of the autograd node, which goes with the graph and not with the backward pass; and
litgpt/finetune/lora.py keeps the logits, which hold their graph, until the next micro-batch's are there. (Of 2023's
scripts the first micro-batch has the longest sequence, ``--longest-first``, and nothing is there before it.)
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser
from typing import Any

from estimators.activations import OWN
from estimators.activations.adapters import DECODED
from estimators.activations.blocks import attend, layer_norm, rms_norm_fp32, rotated, tables
from estimators.activations.chain import Network, alike
from estimators.activations.linear import linear
from estimators.activations.op import FP32, INT64, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.calculator import estimate
from estimators.models.config_fields import Fields
from estimators.models.families.parts import Heads, heads
from estimators.models.model import Model, Shape
from estimators.models.resolve import resolve
from estimators.result import Estimate

CHUNK = 128
#: Fields of a configuration that LitGPT's model is told by; ``plain``: LayerNorm, biases, an MLP without a gate,
#: attention and MLP side by side under one norm (phi).
_KEPT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def model(
    name: str,
    *,
    rank: int = 0,
    quantised: str = "",
    everywhere: bool = False,
    dropout: float = 0.05,
    longest_first: bool = False,
) -> Model:
    """LitGPT's model with the sizes of a published one, adapters of ``rank`` on queries and values (``everywhere``: on
    every linear layer and the head), and all linear layers in 4 bits."""
    own = dict(resolve(name).config or {})
    plain = own["model_type"] in ("phi", "falcon")
    if own["model_type"] == "falcon":
        own |= {"intermediate_size": 4 * own["hidden_size"], "num_key_value_heads": 1}
    config: dict[str, Any] = {
        **{k: own[k] for k in _KEPT if own.get(k)},
        "model_type": "litgpt",
        "vocab_size": own["vocab_size"],
        "plain": plain,
        "rank": rank,
        "everywhere": everywhere,
        "quantised": bool(quantised),
        "longest_first": longest_first,
        "dropout": dropout,
    }
    f = Fields(config, name)
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    total = (a.n + 2 * a.kv) * a.dim
    layer: list[tuple[str, Shape]] = [("norm_1.weight", (width,)), ("attn.attn.weight", (total, width))]
    if rank and everywhere:
        layer += [("attn.a", (3 * rank, width)), ("attn.b", (total, rank))]
    elif rank:
        layer += [("attn.a", (2 * rank, width)), ("attn.b", ((a.n + a.kv) * a.dim, rank))]

    def full(named: str, rows: int, cols: int) -> list[tuple[str, Shape]]:
        found: list[tuple[str, Shape]] = [(f"{named}.weight", (rows, cols))]
        return [*found, (f"{named}.a", (rank, cols)), (f"{named}.b", (rows, rank))] if rank and everywhere else found

    layer += full("attn.proj", width, a.n * a.dim)
    layer += [] if plain else [("norm_2.weight", (width,))]
    layer += full("mlp.fc_1", ffn, width) + ([] if plain else full("mlp.fc_2", ffn, width))
    layer += full("mlp.proj", width, ffn)
    shapes: list[tuple[str, Shape]] = [("wte.weight", (f.integer("vocab_size"), width))]
    shapes += [(f"h.{i}.{n}", shape) for i in range(f.layers()) for n, shape in layer]
    shapes += [("ln_f.weight", (width,)), *full("lm_head", f.integer("vocab_size"), width)]
    adapters = {n for n, _ in shapes if n.endswith((".a", ".b"))}
    linears = {n for n, shape in shapes if len(shape) == 2 and n not in adapters and n != "wte.weight"}
    frozen = frozenset({n for n, _ in shapes} - adapters) if rank else frozenset()
    return Model(
        f"LitGPT's {name}", tuple(shapes), "exact", frozen, dict.fromkeys(linears, quantised) if quantised else {},
        config=config,
    )  # fmt: skip


def said(command: str) -> Estimate:
    """The estimate of ``MODEL [--rank R] [--everywhere] [--longest-first] [--quantised KIND] --seq N [--batch N]
    [--accumulate N]``, with bitsandbytes as it was then."""
    parser = ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--everywhere", action="store_true")
    parser.add_argument("--longest-first", action="store_true")
    parser.add_argument("--quantised", default="")
    for flag, default in (("rank", 0), ("seq", 0), ("batch", 1), ("accumulate", 1)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    args = parser.parse_args(shlex.split(command))
    described = model(
        args.name,
        rank=args.rank,
        quantised=args.quantised,
        everywhere=args.everywhere,
        longest_first=args.longest_first,
    )
    return estimate(
        described,
        "adamw-bf16",
        seq=args.seq,
        batch=args.batch,
        accumulate=args.accumulate,
        versions="bitsandbytes=0.42",
    )


def network(f: Fields, step: Step) -> Network:
    width, ffn, a, vocab = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f), f.integer("vocab_size")
    rank, everywhere, plain = f.integer("rank", least=0), f.flag("everywhere", False), f.flag("plain", False)
    total, dropout, quantised = (a.n + 2 * a.kv) * a.dim, f.share("dropout", 0.0), f.flag("quantised", False)
    #: Inputs of the products of the micro-batch before: of queries, keys and values, of the attention's result, and of
    #: both sides of the MLP, and the head's; and its logits in fp32.
    after_another = not f.flag("longest_first", False)
    before = step.tokens * DECODED * (f.layers() * (2 * width + a.n * a.dim + ffn) + width)
    before = (before * quantised + step.tokens * vocab * FP32) * after_another

    def norm(t: Tape, x: Tensor) -> Tensor:
        return layer_norm(t, x, width, affine=2) if plain else rms_norm_fp32(t, x, width)

    def adapted(t: Tape, x: Tensor, y: Tensor, cols: int, rows: int, parts: int = 1, source: int = 0) -> Tensor:
        """``y + pad(B(A(dropout(x))))``; ``source``: columns that are padded to ``rows``."""
        tokens = x.numel // cols
        first, second = t.parameter((parts * rank, cols)), t.parameter(((source or rows), rank))
        x = t.dropout(x, dropout)
        low = t.op([x], tokens * parts * rank, saves=[x], gradients=parts * rank * cols * first.item)
        up = t.op([low], tokens * (source or rows), saves=[low], gradients=(source or rows) * rank * second.item)
        if source:
            up = t.op([up], tokens * rows, saves=[up])  # index_copy
        return t.add(y, t.copy(up))

    def multiplied(t: Tape, x: Tensor, cols: int, rows: int) -> Tensor:
        if not quantised:
            return linear(t, x, cols, rows)
        t.parameter((rows, cols))
        decoded = 2 * DECODED * cols * rows
        return t.op([x], x.numel // cols * rows, saves=[x], forward_tmp=decoded, backward_tmp=decoded)

    def full(t: Tape, x: Tensor, cols: int, rows: int) -> Tensor:
        y = multiplied(t, x, cols, rows)
        return adapted(t, x, y, cols, rows) if rank and everywhere else y

    def attention(t: Tape, x: Tensor) -> Tensor:
        qkv = linear(t, x, width, total)
        if rank:
            source = 0 if everywhere else (a.n + a.kv) * a.dim
            qkv = adapted(t, x, qkv, width, total, 3 if everywhere else 2, source)
        q = rotated(t, t.op([qkv], step.tokens * a.n * a.dim), FP32)
        k, v = t.op([qkv], step.tokens * a.kv * a.dim), qkv
        if a.kv != a.n:
            k, v = t.copy(k, step.tokens * a.n * a.dim), t.op([qkv], step.tokens * a.n * a.dim)
        k = rotated(t, k, FP32)
        return full(t, attend(t, step, q, k, v, Heads(a.n, a.n, a.dim), relaid=True), a.n * a.dim, width)

    def mlp(t: Tape, x: Tensor) -> Tensor:
        gate = full(t, x, width, ffn)
        if plain:
            return full(t, t.activation(gate, "gelu"), ffn, width)
        up = full(t, x, width, ffn)
        return full(t, t.mul(t.activation(gate, "silu"), up), ffn, width)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = norm(t, x)
        if plain:
            return t.add(t.add(mlp(t, y), attention(t, y)), x)
        x = t.add(attention(t, y), x)
        return t.add(mlp(t, norm(t, x)), x)

    def head(t: Tape, x: Tensor) -> Tensor:
        x = norm(t, x)
        p, chunk = t.parameter((vocab, width)), min(step.tokens, step.batch * CHUNK) * vocab
        logits, probabilities = t.tensor(step.tokens * vocab, FP32), t.tensor(step.tokens * vocab, FP32)
        saves = [logits, probabilities, t.tensor(step.tokens, INT64), *([x] if p.trains or everywhere else [])]
        made = width * vocab * p.item * p.trains + everywhere * rank * (width + vocab) * 2
        decoded = width * vocab * 2 * DECODED * quantised
        # When the head runs there are the logits of the micro-batch before and this one's in 16 bits; when the loss
        # does, this one's in fp32 and probabilities.
        multiplying = before + logits.nbytes // 2 + decoded
        lossy = logits.nbytes + probabilities.nbytes
        tmp = max(chunk * 2, multiplying - lossy), chunk * 10 + decoded
        return t.op([x], 1, FP32, saves=saves, gradients=made, forward_tmp=tmp[0], backward_tmp=tmp[1])

    def embed(t: Tape) -> Tensor:
        return t.embedding(step.tokens, vocab, width)

    return Network(embed, alike(layer, f.layers()), head, tables(step, a.dim, FP32))


OWN["litgpt"] = network
