"""A linear layer: torch's, one of torchao's in float8, or what quantised weights and adapters make of it."""

from __future__ import annotations

from estimators.activations.adapters import adapted, quantised
from estimators.activations.op import Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.scope import Parameter


def linear(
    t: Tape, x: Tensor, cols: int, rows: int, bias: bool = False, name: str = "", transposed: bool = False
) -> Tensor:
    """torch.nn.Linear(cols, rows), or what a quantised weight makes of it, and its adapter where there is one.
    ``name``: the module's, where modules of this shape are not defined in the order in which they run. ``transposed``:
    the weight is turned before it is multiplied; autocast keeps no copy of a view, and casts it for each product."""
    tokens, given = x.numel // cols, x
    p = t.parameter((rows, cols), name=name)
    if p.storage:
        y = quantised(t, x, p, cols, rows)
        y = adapted(t, given, y, p, cols, rows) if p.adapter else y
        t.hold(given)
        return y
    if transposed and t.autocast and p.trains and p.item != t.mm:
        return _cast_each_time(t, t.cast(x, t.mm), p, cols, rows)
    copies: list[Tensor] = []
    item, once = x.item, 0
    if t.autocast:  # the input is cast for every layer, a weight that trains once, until the forward pass ends
        x, item = t.cast(x, t.mm), t.mm
        if p.item != t.mm:
            copies = [t.tensor(cols * rows, t.mm)] if x.requires else []
            if p.trains:
                t.cached += (cols + bias) * rows * t.mm
            else:
                once = cols * rows * t.mm
    elif p.item > x.item:
        x, item = t.cast(x, p.item), p.item
    source, again = t.sources.get(id(x)), 0
    if source is not None:  # gathered again for the weight's gradient
        again = x.nbytes * p.trains
    # torchao's Float8Linear saves its input as it is, and casts both operands to 8 bits for each product.
    eight = t.float8 and p.trains
    y = t.op(
        [x],
        tokens * rows,
        item,
        product=True,
        saves=[*([x if source is None else source] if p.trains else []), *copies],
        gradients=cols * rows * p.trains * p.item + rows * _trained_bias(t, p, bias),
        forward_tmp=once + eight * (cols * rows + tokens * cols),
        backward_tmp=again
        + cols * rows * t.mm * (bool(copies) and p.trains)
        + eight * (max(cols * rows, tokens * cols) + tokens * rows),
    )
    if not p.adapter:
        return y
    y = adapted(t, given, y, p, cols, rows)
    t.hold(given)
    return y


def _cast_each_time(t: Tape, x: Tensor, p: Parameter, cols: int, rows: int) -> Tensor:
    weight = t.op([Tensor(0, p.item)], cols * rows, t.mm, gradients=cols * rows * p.item)
    y = t.op([x, weight], x.numel // cols * rows, product=True, saves=[x, weight])
    return adapted(t, x, y, p, cols, rows) if p.adapter else y


def _trained_bias(t: Tape, p: Parameter, bias: bool) -> int:
    """Bytes of one element of the bias's gradient. That of a head which shares the embedding's weight has a name of
    its own, and is taken to train with the segment."""
    if not bias:
        return 0
    return p.bias_item * p.bias_trains if p.bias_item else p.item * t.trains
