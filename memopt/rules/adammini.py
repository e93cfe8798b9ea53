"""Adam-mini: AdamW with one second moment for each row instead of one for each element."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from memopt.rules.adamw import looked_ahead
from memopt.rules.base import EXP_AVG, Hyper, Moment, Rule, State

if TYPE_CHECKING:
    from torch import Tensor

#: One number per row, in every format.
ROW_SQ = Moment("exp_avg_sq", signed=False, fixed_format="rowmean")


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One Adam-mini step, with v one number per row::

        p <- p * (1 - lr * weight_decay)
        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * mean over the row of g²
        p <- p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

    A row is an output neuron of a linear layer, a token of an embedding, an output channel of a convolution. State:
    4 bytes per parameter for m in 32 bits, 1.02 in 8 bits, and 4 bytes per row.

    Source: Zhang et al., "Adam-mini: use fewer learning rates to gain more", ICLR 2025. The paper gives queries and
    keys one number per head, and norms and biases one per tensor; heads are not to be seen in a name or a shape, so
    rows are used there too, and 256 elements of a vector: finer than the paper, and never coarser.
    """
    beta1, beta2 = h["betas"]
    lr = float(h["lr"])
    p.mul_(1 - lr * h["weight_decay"])
    exp_avg = state.write("exp_avg", state.read("exp_avg").lerp_(g, 1 - beta1))
    exp_avg = looked_ahead(exp_avg, g, t, h)
    exp_avg_sq = state.read("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
    exp_avg_sq = state.write("exp_avg_sq", exp_avg_sq)
    denominator = (exp_avg_sq.sqrt() / sqrt(1 - beta2**t)).add_(h["eps"])
    p.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**t))


RULE = Rule(
    name="adammini",
    summary="AdamW with one second moment per row; one full moment",
    source="Zhang et al. 2025",
    defaults={"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "nesterov": False},
    moments=lambda h, shape: (EXP_AVG, ROW_SQ),
    update=update,
    in_torch=("nesterov",),
    decoupled=lambda h: True,
)
