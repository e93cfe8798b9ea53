"""StableAdamW: AdamW with Adafactor's clipping of the update instead of a clipping of the gradient."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from memopt.rules.adamw import looked_ahead
from memopt.rules.base import EXP_AVG, EXP_AVG_SQ, Hyper, Rule, State

if TYPE_CHECKING:
    from torch import Tensor


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One StableAdamW step::

        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * g²
        a <- lr / max(1, RMS(g / max(sqrt(v̂), eps)) / d),     v̂ = v / (1 - b2^t)
        p <- p * (1 - a * weight_decay)
        p <- p - a / (1 - b1^t) * m / (sqrt(v̂) + eps)

    The RMS, of each tensor, is large when v has not seen gradients as large as this one: such a step is what loss
    spikes come from. State: as AdamW's. Source: Wortsman et al., "Stable and low-precision training for large-scale
    vision-language models", NeurIPS 2023, algorithm 2 (d = 1); the clipping is Adafactor's (Shazeer & Stern 2018).
    """
    beta1, beta2 = h["betas"]
    exp_avg = state.write("exp_avg", state.read("exp_avg").lerp_(g, 1 - beta1))
    exp_avg = looked_ahead(exp_avg, g, t, h)
    exp_avg_sq = state.read("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
    exp_avg_sq = state.write("exp_avg_sq", exp_avg_sq)
    root = exp_avg_sq.sqrt() / sqrt(1 - beta2**t)
    surprise = state.rms(g / root.clamp(min=h["eps"]))
    rate = surprise.div_(h["d"]).clamp_(min=1.0).reciprocal_().mul_(float(h["lr"]))
    p.mul_(1 - rate * h["weight_decay"])
    p.sub_(exp_avg.div(root.add_(h["eps"])).mul_(rate / (1 - beta1**t)))


RULE = Rule(
    name="stableadamw",
    summary="AdamW with Adafactor's clipping of each update",
    source="Wortsman et al. 2023",
    defaults={"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "d": 1.0, "weight_decay": 1e-2, "nesterov": False},
    moments=lambda h, shape: (EXP_AVG, EXP_AVG_SQ),
    update=update,
    in_torch=("nesterov",),
    decoupled=lambda h: True,
    element_wise=False,
)
