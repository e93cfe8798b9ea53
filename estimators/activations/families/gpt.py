"""Decoders with LayerNorm and a plain MLP. Source: transformers' modeling_gpt2.py, modeling_gpt_bigcode.py,
modeling_gptj.py, modeling_bloom.py, modeling_gpt_neox.py, modeling_opt.py, modeling_phi.py and
modeling_starcoder2.py."""

from __future__ import annotations

from estimators.activations.blocks import attend, attention, causal_mask, fused_attention, layer_norm, mlp, tables
from estimators.activations.chain import Network, alike, called_with
from estimators.activations.families.llama import network
from estimators.activations.head import loss
from estimators.activations.linear import linear
from estimators.activations.op import FP32, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.step import Step
from estimators.models.config_fields import Fields
from estimators.models.families.parts import Heads, heads


def gpt2(f: Fields, step: Step, kv: int = 0, act: str = "gelu_new") -> Network:
    """Learned positions, query, key and value in one matrix, dropout after each half of a layer. ``kv``: heads of keys
    and values, 0: as many as of queries."""
    width, vocab = f.integer("n_embd"), f.integer("vocab_size")
    ffn, act = f.optional("n_inner") or 4 * width, f.text("activation_function", act)
    n, positions, p = f.integer("n_head"), f.integer("n_positions", 1024), f.share("resid_pdrop", 0.1)
    tied, dropped = f.flag("tie_word_embeddings", True), f.share("embd_pdrop", 0.1)
    a = Heads(n, kv or n, f.divide("n_embd", "n_head"))

    def embed(t: Tape) -> Tensor:
        words = t.embedding(step.tokens, -(-vocab // step.tp), width, tied=tied)
        return t.dropout(t.scattered(t.add(words, t.embedding(step.seq, positions, width))), dropped)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = fused_attention(
            t,
            step,
            layer_norm(t, x, width),
            width,
            a,
            bias=True,
            out_bias=True,
            rope=False,
            drop=f.share("attn_pdrop", 0.1),
            narrow="" if kv else "gpt2",
        )
        x = t.add(x, t.dropout(y, p))
        return t.add(x, t.dropout(mlp(t, layer_norm(t, x, width), width, ffn, act), p))

    def head(t: Tape, x: Tensor) -> Tensor:
        return loss(t, step, layer_norm(t, x, width), width, vocab)

    return Network(embed, alike(layer, f.layers("n_layer")), head, masks=called_with(causal_mask(step)))


def gpt_bigcode(f: Fields, step: Step) -> Network:
    """GPT-2 with one head of keys and values."""
    return gpt2(f, step, f.flag("multi_query", True), "gelu_pytorch_tanh")


def gptj(f: Fields, step: Step) -> Network:
    """Attention and MLP side by side under one norm. Attention is computed in fp32 and eagerly; the tables of rotary
    positions are made anew for every layer, for queries and for keys."""
    width, vocab, act = f.integer("n_embd"), f.integer("vocab_size"), f.text("activation_function", "gelu_new")
    ffn, n, rotary = f.optional("n_inner") or 4 * width, f.integer("n_head"), f.optional("rotary_dim", 64)
    p, dropped, dim = f.share("resid_pdrop", 0.0), f.share("embd_pdrop", 0.0), f.divide("n_embd", "n_head")
    size, scores_size = step.tokens * width, step.batch * n * step.seq**2
    if step.attention == "flash" or f.share("attn_pdrop", 0.0):
        raise KeyError("flash attention" if step.attention == "flash" else "attn_pdrop")

    def embed(t: Tape) -> Tensor:
        return t.dropout(t.embedding(step.tokens, vocab, width, tied=f.flag("tie_word_embeddings", False)), dropped)

    def turned(t: Tape, x: Tensor) -> Tensor:
        cos, sin = (t.tensor(step.seq * (rotary or dim)) for _ in range(2))
        part = step.tokens * n * (rotary or dim)
        y = t.add(t.op([x], part, saves=[cos]), t.op([t.copy(x, part)], saves=[sin]))
        return t.op([y, x], size) if rotary else y

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = layer_norm(t, x, width)
        q, k, v = (linear(t, y, width, width, name=name) for name in ("q_proj", "k_proj", "v_proj"))
        k, q = (t.copy(t.cast(turned(t, z), FP32)) for z in (k, q))
        scores = t.copy(
            t.copy(t.op([q, k], scores_size, FP32, saves=[q, k], product=True))
        )  # scaled, and with the mask
        probabilities, v = t.cast(t.root(scores), t.item), t.copy(v)
        attended = t.copy(t.op([probabilities, v], size, saves=[probabilities, v], product=True, item=t.item))
        attended = t.dropout(linear(t, attended, width, width), p)
        return t.add(t.add(attended, t.dropout(mlp(t, y, width, ffn, act), p)), x)

    def head(t: Tape, x: Tensor) -> Tensor:
        return loss(t, step, layer_norm(t, x, width), width, vocab, bias=True)

    mask = causal_mask(step._replace(attention="eager"))
    return Network(embed, alike(layer, f.layers("n_layer")), head, masks=called_with(mask))


def bloom(f: Fields, step: Step) -> Network:
    """A norm on the embedding, ALiBi, eager attention of which queries, keys and values are copied head by head."""
    width, vocab = f.optional("n_embed") or f.integer("hidden_size"), f.integer("vocab_size")
    n, p = f.integer("n_head", 8), f.share("hidden_dropout", 0.0)
    size, scores_size = step.tokens * width, step.batch * n * step.seq**2
    after = f.flag("apply_residual_connection_post_layernorm", False)
    if f.share("attention_dropout", 0.0):
        raise KeyError("attention_dropout")

    def embed(t: Tape) -> Tensor:
        tied = f.flag("tie_word_embeddings", True)
        return layer_norm(t, t.embedding(step.tokens, vocab, width, tied=tied), width)

    def gelu(t: Tape, x: Tensor) -> Tensor:
        """One function of autograd's: five temporaries in its forward, more in its backward pass."""
        return t.op([x], saves=[x], forward_tmp=2 * x.nbytes, backward_tmp=4 * x.nbytes)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = layer_norm(t, x, width)
        qkv = linear(t, y, width, 3 * width, bias=True)
        q, k, v = (t.op([qkv], size) for _ in range(3))
        scores = t.copy(t.op([q, k], scores_size, saves=[q, k], product=True))
        wider = scores.numel * (FP32 - scores.item)
        softmax = t.op([scores], item=FP32, saves_out=True, forward_tmp=wider, backward_tmp=wider)
        probabilities = t.cast(softmax, t.item)
        attended = t.copy(t.op([probabilities, v], size, saves=[probabilities, v], product=True))
        x = t.add(t.dropout(linear(t, attended, width, width, bias=True), p), y if after else x)
        y = layer_norm(t, x, width)
        z = linear(t, gelu(t, linear(t, y, width, 4 * width, bias=True)), 4 * width, width, bias=True)
        return t.add(t.dropout(z, p), y if after else x)

    def head(t: Tape, x: Tensor) -> Tensor:
        return loss(t, step, layer_norm(t, x, width), width, vocab)

    alibi = step.batch * n * step.seq * step.item
    mask = causal_mask(step._replace(attention="eager"))
    return Network(embed, alike(layer, f.layers("n_layer")), head, masks=called_with(mask + alibi))


def gpt_neox(f: Fields, step: Step) -> Network:
    """Rotary positions on a quarter of each head; attention and MLP side by side, each under a norm of its own."""
    width, ffn, vocab = f.integer("hidden_size"), f.integer("intermediate_size"), f.integer("vocab_size")
    n, bias, act = f.integer("num_attention_heads"), f.flag("attention_bias", True), f.text("hidden_act", "gelu")
    a, parallel = Heads(n, n, f.divide("hidden_size", "num_attention_heads")), f.flag("use_parallel_residual", True)
    p = f.share("hidden_dropout", 0.0)

    def embed(t: Tape) -> Tensor:
        return t.embedding(step.tokens, vocab, width, tied=f.flag("tie_word_embeddings", False))

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = fused_attention(t, step, layer_norm(t, x, width), width, a, bias=bias, out_bias=bias, rope=True)
        y = t.dropout(y, p)
        if not parallel:
            x = t.add(x, y)
        z = t.dropout(mlp(t, layer_norm(t, x, width), width, ffn, act), p)
        return t.add(t.add(z, y), x) if parallel else t.add(z, x)

    def head(t: Tape, x: Tensor) -> Tensor:
        return loss(t, step, layer_norm(t, x, width), width, vocab)

    return Network(embed, alike(layer, f.layers()), head, tables(step, a.dim // 4))


def opt(f: Fields, step: Step) -> Network:
    """Learned positions, ReLU; the 350M model's narrow embedding is projected."""
    width, ffn, vocab = f.integer("hidden_size"), f.integer("ffn_dim"), f.integer("vocab_size")
    n, bias, act = f.integer("num_attention_heads"), f.flag("enable_bias", True), f.text("activation_function", "relu")
    narrow, first, p = (
        f.optional("word_embed_proj_dim") or width,
        f.flag("do_layer_norm_before", True),
        f.share("dropout", 0.1),
    )
    a, positions = (
        Heads(n, n, f.divide("hidden_size", "num_attention_heads")),
        f.integer("max_position_embeddings", 2048),
    )
    tied, last = f.flag("tie_word_embeddings", True), first and not f.flag("_remove_final_layer_norm", False)

    def embed(t: Tape) -> Tensor:
        words = t.embedding(step.tokens, vocab, narrow, tied=tied)
        if narrow != width:
            words = linear(t, words, narrow, width)
        return t.add(words, t.embedding(step.tokens, positions + 2, width))

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = layer_norm(t, x, width) if first else x
        q, k, v = (
            t.copy(linear(t, y, width, width, bias, "q_proj")),
            linear(t, y, width, width, bias, "k_proj"),
            linear(t, y, width, width, bias, "v_proj"),
        )
        y = linear(t, attend(t, step, q, k, v, a), width, width, bias)
        x = t.add(x, t.dropout(y, p))
        x = x if first else layer_norm(t, x, width)
        y = t.dropout(mlp(t, layer_norm(t, x, width) if first else x, width, ffn, act, bias), p)
        return t.add(x, y) if first else layer_norm(t, t.add(x, y), width)

    def head(t: Tape, x: Tensor) -> Tensor:
        x = layer_norm(t, x, width) if last else x
        x = linear(t, x, width, narrow) if narrow != width else x
        return loss(t, step, x, narrow, vocab)

    return Network(embed, alike(layer, f.layers()), head, masks=called_with(causal_mask(step)))


def phi(f: Fields, step: Step) -> Network:
    """Attention and MLP side by side under one norm; half of each head is rotated."""
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f)
    act, p = f.text("hidden_act", "gelu_new"), f.share("resid_pdrop", 0.0)
    if f.flag("qk_layernorm", False):
        raise KeyError("qk_layernorm")

    def norm(t: Tape, x: Tensor) -> Tensor:
        return layer_norm(t, x, width)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = norm(t, x)
        attended = t.dropout(attention(t, step, y, width, a, bias=True, out_bias=True, partial=True), p)
        return t.add(t.add(attended, t.dropout(mlp(t, y, width, ffn, act), p)), x)

    return network(f, step, layer, norm, rope=a.dim // 2, head_bias=True)


def starcoder2(f: Fields, step: Step) -> Network:
    width, ffn, a = f.integer("hidden_size"), f.integer("intermediate_size"), heads(f, kv=2)
    bias, p = f.flag("use_bias", True), f.share("residual_dropout", 0.0)
    act = f.text("hidden_act", "gelu_pytorch_tanh")

    def norm(t: Tape, x: Tensor) -> Tensor:
        return layer_norm(t, x, width)

    def layer(t: Tape, x: Tensor) -> Tensor:
        y = attention(t, step, norm(t, x), width, a, bias=bias, out_bias=bias)
        x = t.add(x, t.dropout(y, p))
        return t.add(x, t.dropout(mlp(t, norm(t, x), width, ffn, act, bias), p))

    return network(f, step, layer, norm, rope=a.dim, tied=True)
