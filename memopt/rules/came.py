"""CAME: Adafactor's factored second moment, guided by how much the update can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memopt.core.rows import Shape
from memopt.rules.base import EXP_AVG, EXP_AVG_SQ, Hyper, Moment, Rule, State

if TYPE_CHECKING:
    from torch import Tensor

EXP_AVG_RES = Moment("exp_avg_res", signed=False, factorable=True)


def moments(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    """Vectors keep no residual: the published algorithm uses it on matrices only."""
    return (EXP_AVG, EXP_AVG_SQ, *((EXP_AVG_RES,) if len(shape) >= 2 else ()))


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One CAME step, v and r factored into row and column means on matrices::

        v <- b2 * v + (1 - b2) * (g² + eps1)
        u <- g / sqrt(v);  u <- u / max(1, RMS(u) / d)
        m <- b1 * m + (1 - b1) * u
        r <- b3 * r + (1 - b3) * ((u - m)² + eps2)       (matrices)
        p <- p * (1 - lr * weight_decay) - lr * m / sqrt(r)   (matrices; vectors: - lr * m)

    State: 4 bytes per parameter for m, and two factored moments. In a format other than ``factored``, v and r are
    kept whole in that format. Source: Luo et al., "CAME: confidence-guided adaptive memory efficient optimization",
    ACL 2023, and its reference implementation (no bias correction, r on matrices only).
    """
    beta1, beta2, beta3 = h["betas"]
    eps1, eps2 = h["eps"]
    square = g.square().add_(eps1)
    exp_avg_sq = state.write("exp_avg_sq", state.read("exp_avg_sq").lerp_(square, 1 - beta2))
    u = exp_avg_sq.rsqrt().mul_(g)
    u.mul_((state.rms(u) / h["d"]).clamp_(min=1.0).reciprocal_())
    exp_avg = state.write("exp_avg", state.read("exp_avg").lerp_(u, 1 - beta1))
    step = exp_avg
    if p.dim() >= 2:
        residual = u.sub_(exp_avg).square_().add_(eps2)
        exp_avg_res = state.write("exp_avg_res", state.read("exp_avg_res").lerp_(residual, 1 - beta3))
        step = exp_avg_res.rsqrt().mul_(exp_avg)
    lr = float(h["lr"])
    p.mul_(1 - lr * h["weight_decay"])
    p.sub_(step, alpha=lr)


RULE = Rule(
    name="came",
    summary="Adafactor's second moment with a confidence term; one full moment",
    source="Luo et al. 2023",
    defaults={"lr": 2e-4, "betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16), "d": 1.0, "weight_decay": 0.0},
    moments=moments,
    update=update,
    decoupled=lambda h: True,
    default_format="factored",
    element_wise=False,
    rate_factor=0.15,
)
