"""LAMB: Adam's step, scaled in each tensor to the size of the tensor. For large batches."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from memopt.rules.adamw import looked_ahead
from memopt.rules.base import EXP_AVG, EXP_AVG_SQ, Hyper, Rule, State

if TYPE_CHECKING:
    from torch import Tensor


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One LAMB step::

        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * g²
        u <- m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p
        p <- p - lr * |p| / |u| * u                          (the ratio is 1 where p or u is zero)

    State: as AdamW's. Source: You et al., "Large batch optimization for deep learning: training BERT in 76 minutes",
    ICLR 2020, algorithm 2, with phi(z) = z. bitsandbytes' LAMB bounds the step by the parameter's norm instead.
    """
    beta1, beta2 = h["betas"]
    exp_avg = state.write("exp_avg", state.read("exp_avg").lerp_(g, 1 - beta1))
    exp_avg = looked_ahead(exp_avg, g, t, h)
    exp_avg_sq = state.read("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
    exp_avg_sq = state.write("exp_avg_sq", exp_avg_sq)
    denominator = (exp_avg_sq.sqrt() / sqrt(1 - beta2**t)).add_(h["eps"])
    u = exp_avg.div(1 - beta1**t).div_(denominator)
    if h["weight_decay"]:
        u.add_(p, alpha=h["weight_decay"])
    size, step = state.rms(p), state.rms(u)  # their ratio is that of the norms
    trust = (size / step).where((size > 0) & (step > 0), 1.0)
    p.sub_(u.mul_(trust), alpha=float(h["lr"]))


RULE = Rule(
    name="lamb",
    summary="Adam's step scaled to the size of each tensor; for large batches",
    source="You et al. 2020",
    defaults={"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 1e-2, "nesterov": False},
    moments=lambda h, shape: (EXP_AVG, EXP_AVG_SQ),
    update=update,
    in_torch=("nesterov",),
    decoupled=lambda h: True,
    element_wise=False,
    rate_factor=10.0,
)
