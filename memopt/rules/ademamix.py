"""AdEMAMix: AdamW with a second, slow mean of the gradients beside the fast one."""

from __future__ import annotations

from math import exp, log, sqrt
from typing import TYPE_CHECKING

from memopt.rules.adamw import longest, looked_ahead
from memopt.rules.base import EXP_AVG, EXP_AVG_SQ, Hyper, Moment, Rule, State

if TYPE_CHECKING:
    from torch import Tensor

EXP_AVG_SLOW = Moment("exp_avg_slow")


def warmed(t: int, h: Hyper) -> tuple[float, float]:
    """(alpha, b3) at step t: alpha rises in a line over ``t_alpha`` steps, the half-life of the slow mean over
    ``t_beta3`` steps from that of b1."""
    beta1, _, beta3 = h["betas"]
    alpha = h["alpha"] * min(t / h["t_alpha"], 1.0) if h["t_alpha"] else h["alpha"]
    if h["t_beta3"] and beta3 > 0:
        x = min(t / h["t_beta3"], 1.0)
        ratio = log(beta3) / log(beta1) if beta1 > 0 else 0.0
        beta3 = min(exp(log(beta3) / ((1 - x) * ratio + x)), beta3)
    return alpha, beta3


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One AdEMAMix step::

        p <- p * (1 - lr * weight_decay)
        m <- b1 * m + (1 - b1) * g
        s <- b3 * s + (1 - b3) * g
        v <- b2 * v + (1 - b2) * g²
        p <- p - lr * (m / (1 - b1^t) + alpha * s) / (sqrt(v / (1 - b2^t)) + eps)

    ``t_alpha`` and ``t_beta3`` are the steps over which alpha and b3 rise; the paper sets both to all steps of a run.
    With a factored v no element moves by more than lr * (:func:`~memopt.rules.adamw.longest` + alpha).
    State: 12 bytes per parameter in 32 bits, 3.05 in 8 bits, 1.59 in 4 bits.
    Source: Pagliardini, Ablin & Grangier, "The AdEMAMix optimizer: better, faster, older", ICLR 2025.
    """
    beta1, beta2, _ = h["betas"]
    alpha, beta3 = warmed(t, h)
    lr = float(h["lr"])
    p.mul_(1 - lr * h["weight_decay"])
    exp_avg = state.write("exp_avg", state.read("exp_avg").lerp_(g, 1 - beta1))
    exp_avg = looked_ahead(exp_avg, g, t, h)
    slow = state.write("exp_avg_slow", state.read("exp_avg_slow").lerp_(g, 1 - beta3))
    exp_avg_sq = state.read("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
    exp_avg_sq = state.write("exp_avg_sq", exp_avg_sq)
    denominator = (exp_avg_sq.sqrt() / sqrt(1 - beta2**t)).add_(h["eps"])
    mean = exp_avg.div(1 - beta1**t).add_(slow, alpha=alpha)
    if state.rank_one("exp_avg_sq"):
        most = lr * (longest(beta1, beta2) + alpha)
        p.add_(mean.div_(denominator).mul_(-lr).clamp_(-most, most))
    else:
        p.addcdiv_(mean, denominator, value=-lr)


RULE = Rule(
    name="ademamix",
    summary="AdamW with a second, slow mean of the gradients",
    source="Pagliardini et al. 2025",
    defaults={
        "lr": 1e-3,
        "betas": (0.9, 0.999, 0.9999),
        "alpha": 5.0,
        "t_alpha": None,
        "t_beta3": None,
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "nesterov": False,
    },
    moments=lambda h, shape: (EXP_AVG, EXP_AVG_SLOW, EXP_AVG_SQ),
    update=update,
    in_torch=("nesterov",),
    kernel_fields=lambda h: {
        "alpha": h["alpha"],
        "alpha_steps": h["t_alpha"] or 0,
        "beta3_steps": h["t_beta3"] or 0,
    },
    decoupled=lambda h: True,
)
