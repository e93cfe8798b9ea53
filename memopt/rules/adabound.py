"""AdaBound: Adam whose element-wise rates are squeezed between two bounds until they are SGD's one rate."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import is_number
from memopt.rules.adamw import looked_ahead
from memopt.rules.base import EXP_AVG, EXP_AVG_SQ, Hyper, Rule, State

if TYPE_CHECKING:
    from torch import Tensor


def presets(given: Hyper) -> dict[str, Any]:
    """``base_lr`` is the rate of this moment, as a number: a rate that is a tensor is changed in place."""
    lr = given.get("lr", 1e-3)
    return {"base_lr": float(lr)} if is_number(lr) else {}


def bounds(t: int, h: Hyper) -> tuple[float, float]:
    """The lowest and the highest rate of an element at step t; both tend to ``final_lr``."""
    lr = float(h["lr"])
    base = h["base_lr"]
    final = h["final_lr"] * (lr / base if base else 1.0)
    return final * (1 - 1 / (h["gamma"] * t + 1)), final * (1 + 1 / (h["gamma"] * t))


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One AdaBound step::

        g <- g + weight_decay * p
        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * g²
        a <- clamp(lr * sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps),
                   final_lr * (1 - 1 / (gamma * t + 1)), final_lr * (1 + 1 / (gamma * t)))
        p <- p - a * m

    ``final_lr`` belongs to the rate ``base_lr``, that which the group was made with unless it is given, and follows
    ``lr`` from there, whoever sets it: here it stands for ``final_lr * lr / base_lr``.

    State: as AdamW's. Source: Luo, Xiong, Liu & Sun, "Adaptive gradient methods with dynamic bound of learning rate",
    ICLR 2019; bias correction, eps and the scaling of ``final_lr`` as in its reference implementation.
    """
    beta1, beta2 = h["betas"]
    if h["weight_decay"]:
        g = g.add(p, alpha=h["weight_decay"])
    exp_avg = state.write("exp_avg", state.read("exp_avg").lerp_(g, 1 - beta1))
    exp_avg = looked_ahead(exp_avg, g, t, h)
    exp_avg_sq = state.read("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
    exp_avg_sq = state.write("exp_avg_sq", exp_avg_sq)
    lowest, highest = bounds(t, h)
    size = float(h["lr"]) * sqrt(1 - beta2**t) / (1 - beta1**t)
    rates = exp_avg_sq.sqrt().add_(h["eps"]).reciprocal_().mul_(size).clamp_(lowest, highest)
    p.sub_(rates.mul_(exp_avg))


RULE = Rule(
    name="adabound",
    summary="Adam whose rates are bounded and end as SGD's",
    source="Luo et al. 2019",
    defaults={
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "final_lr": 0.1,
        "gamma": 1e-3,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "nesterov": False,
        "base_lr": None,
    },
    presets=presets,
    moments=lambda h, shape: (EXP_AVG, EXP_AVG_SQ),
    update=update,
    in_torch=("nesterov",),
    kernel_fields=lambda h: {
        "final_lr": h["final_lr"],
        "gamma": h["gamma"],
        "peak": h["base_lr"] or 0.0,
    },
)
