"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memopt.rules.base import EXP_AVG, Hyper, Rule, State

if TYPE_CHECKING:
    from torch import Tensor


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One Lion step::

        p <- p * (1 - lr * weight_decay)
        p <- p - lr * sign(b1 * m + (1 - b1) * g)
        m <- b2 * m + (1 - b2) * g

    State: 4 bytes per parameter in 32 bits, 1.02 in 8 bits. Source: Chen et al., "Symbolic discovery of optimization
    algorithms", 2023. Use a rate three to ten times lower than AdamW's and a decay as many times higher.
    """
    beta1, beta2 = h["betas"]
    exp_avg = state.read("exp_avg")
    p.mul_(1 - float(h["lr"]) * h["weight_decay"])
    p.sub_(exp_avg.lerp(g, 1 - beta1).sign_(), alpha=float(h["lr"]))
    state.write("exp_avg", exp_avg.lerp_(g, 1 - beta2))


RULE = Rule(
    name="lion",
    summary="sign of an interpolated momentum; one moment",
    source="Chen et al. 2023",
    defaults={"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
    moments=lambda h, shape: (EXP_AVG,),
    update=update,
    decoupled=lambda h: True,
    rate_factor=0.25,
)
