"""RAdam: Adam whose adaptive rate is rectified while its variance is not yet known."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from memopt.rules.adamw import longest, looked_ahead
from memopt.rules.base import EXP_AVG, EXP_AVG_SQ, Hyper, Rule, State

if TYPE_CHECKING:
    from torch import Tensor


def rectification(t: int, beta2: float) -> float | None:
    """The factor r_t, or None while the variance of the adaptive rate is not tractable (rho_t <= 5)."""
    rho_inf = 2 / (1 - beta2) - 1
    rho_t = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho_t <= 5:
        return None
    return sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One RAdam step: Adam's moments; then, with m̂ = m / (1 - b1^t) and r_t the rectification::

        p <- p - lr * m̂ * r_t * sqrt(1 - b2^t) / (sqrt(v) + eps)     if rho_t > 5
        p <- p - lr * m̂                                              otherwise

    With a factored v no element moves by more than lr * r_t * :func:`~memopt.rules.adamw.longest`.
    ``weight_decay`` is an L2 term, or decoupled with ``decoupled_weight_decay=True``. State: as AdamW's.
    Source: Liu et al., "On the variance of the adaptive learning rate and beyond", ICLR 2020; threshold and place
    of eps as in torch.optim.RAdam.
    """
    beta1, beta2 = h["betas"]
    lr = float(h["lr"])
    if h["weight_decay"]:
        if h["decoupled_weight_decay"]:
            p.mul_(1 - lr * h["weight_decay"])
        else:
            g = g.add(p, alpha=h["weight_decay"])
    exp_avg = state.write("exp_avg", state.read("exp_avg").lerp_(g, 1 - beta1))
    exp_avg = looked_ahead(exp_avg, g, t, h)
    exp_avg_sq = state.read("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
    exp_avg_sq = state.write("exp_avg_sq", exp_avg_sq)
    factor = rectification(t, beta2)
    scale = -lr / (1 - beta1**t)
    if factor is None:
        p.add_(exp_avg, alpha=scale)
    else:
        value = scale * factor * sqrt(1 - beta2**t)
        denominator = exp_avg_sq.sqrt().add_(h["eps"])
        if state.rank_one("exp_avg_sq"):
            most = lr * factor * longest(beta1, beta2)
            p.add_(exp_avg.div(denominator).mul_(value).clamp_(-most, most))
        else:
            p.addcdiv_(exp_avg, denominator, value=value)


RULE = Rule(
    name="radam",
    summary="Adam with a rectified adaptive rate; needs no warm-up",
    source="Liu et al. 2020",
    defaults={
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "nesterov": False,
        "decoupled_weight_decay": False,
    },
    moments=lambda h, shape: (EXP_AVG, EXP_AVG_SQ),
    update=update,
    in_torch=("nesterov",),
    decoupled=lambda h: bool(h["decoupled_weight_decay"]),
)
