"""Linear layers with quantised weights, and adapters beside linear layers. Source: bitsandbytes' nn/modules.py and
autograd/_functions.py (0.50), PEFT's tuners/lora (0.21), GPTQ's torch kernel."""

from __future__ import annotations

from estimators.activations.op import FP32, Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.scope import Parameter

#: Bytes of an element of a quantised weight when it is multiplied.
DECODED = 2


def quantised(t: Tape, x: Tensor, p: Parameter, cols: int, rows: int) -> Tensor:
    """The weight is decoded for each product, and again in the backward pass; the result has the input's dtype.

    bitsandbytes' Linear4bit casts its input to the compute dtype (16 bits here), and before 0.43.2 saves that. Its
    Linear8bitLt quantises the input, keeps it as it came as an attribute of its node, and decodes to its dtype. GPTQ's
    decoded weight is saved by autograd.
    """
    tokens, weight = x.numel // cols, cols * rows
    if p.storage == "int8":
        halved = tokens * cols * DECODED * (x.item != DECODED)
        if x.requires and t.pins:
            t.pinned.append(x.stored)
        return t.op(
            [x],
            tokens * rows,
            saves=[x],
            product=True,
            forward_tmp=tokens * cols + halved + tokens * rows * FP32,
            backward_tmp=weight * x.item,
        )
    inner = t.cast(x, t.mm if t.autocast else DECODED)
    gptq = p.storage == "gptq"
    y = t.op(
        [inner],
        tokens * rows,
        saves=[t.tensor(weight, DECODED)] if gptq else [inner] if t.saves_quantised_input else [],
        product=True,
        forward_tmp=weight * DECODED * (not gptq),
        backward_tmp=weight * DECODED * (not gptq),
    )
    return t.cast(y, x.item)


def adapted(t: Tape, x: Tensor, y: Tensor, p: Parameter, cols: int, rows: int) -> Tensor:
    """``y + B(A(dropout(x))) * scaling`` in the adapters' dtype (or autocast's), then back: PEFT's LoraLayer. Those of
    bitsandbytes' layers clone ``y`` first, and under autocast leave the cast to it."""
    a = p.adapter
    assert a is not None
    tokens, bits = x.numel // cols, p.storage not in ("", "gptq")
    if bits:
        y = t.copy(y)
    inner = t.dropout(x if bits and t.autocast else t.cast(x, a.item), t.lora_dropout)
    item, copied = a.item, 0
    if t.autocast and a.item != t.mm:  # copies of both matrices, until the forward pass ends
        inner, item, copied = t.cast(inner, t.mm), t.mm, a.rank * t.mm
        t.cached += copied * (cols + rows)

    def copy(side: int) -> list[Tensor]:
        return [t.tensor(side * a.rank, t.mm)] if copied else []

    low = t.op(
        [inner],
        tokens * a.rank,
        item,
        saves=[inner, *(copy(cols) if inner.requires else [])],
        gradients=cols * a.rank * a.item,
        backward_tmp=cols * copied,
        product=True,
    )
    up = t.op(
        [low],
        tokens * rows,
        item,
        saves=[low, *copy(rows)],
        gradients=rows * a.rank * a.item,
        backward_tmp=rows * copied,
        product=True,
    )
    if a.dora:
        return t.cast(_magnitude(t, y, up, cols * rows, rows * a.item), y.item)
    scaled = t.copy(up)
    if bits and not t.autocast:
        scaled = t.cast(scaled, y.item)
    out = t.cast(t.add(y, scaled), y.item)
    t.hold(inner)
    return out


def _magnitude(t: Tape, y: Tensor, up: Tensor, weight: int, gradient: int) -> Tensor:
    """DoRA: ``(s - 1) * y + s * up * scaling`` with ``s`` the magnitudes over the norms of the rows of the adapted
    weight (of so many elements), which is made whole without a gradient; both results are saved for ``s``."""
    first = t.op([y], saves=[y], gradients=gradient, forward_tmp=3 * weight * FP32, backward_tmp=y.nbytes)
    second = t.copy(t.op([up], saves=[up], backward_tmp=up.nbytes))
    return t.add(first, second)
