"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from memopt.core.rows import Shape
from memopt.rules.base import EXP_AVG, EXP_AVG_SQ, Hyper, Moment, Rule, State

if TYPE_CHECKING:
    from torch import Tensor

DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
    "nesterov": False,
}

MAX_EXP_AVG_SQ = Moment("max_exp_avg_sq", signed=False)


def moments(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    return (EXP_AVG, EXP_AVG_SQ, *((MAX_EXP_AVG_SQ,) if h["amsgrad"] else ()))


def refuse(h: Hyper, fmt: str) -> str | None:
    if h["amsgrad"] and fmt == "factored":
        return "amsgrad needs the largest value of every element, which a factored second moment does not have"
    return None


def longest(beta1: float, beta2: float) -> float:
    """How long Adam's update of an element may be, in units of the rate: (1 - b1) / sqrt(1 - b2), and 1 at least.

    That is what the second moment of the element itself keeps it to when its gradient comes out of nothing (Kingma &
    Ba, section 2.1). A second moment of rank one, a mean over row and column, keeps it to nothing: an element whose
    row and column are smaller than itself would go ten times as far. Such updates are cut off there.
    """
    return max(1.0, (1 - beta1) / sqrt(1 - beta2))


def looked_ahead(exp_avg: Tensor, g: Tensor, t: int, h: Hyper) -> Tensor:
    """What stands in the place of the first moment m, to be divided by 1 - b1^t: with ``nesterov`` that of one step
    more of the same gradient, as of NAdam without its schedule::

        b1 * m * (1 - b1^t) / (1 - b1^(t+1)) + (1 - b1) * g

    Source: Dozat, "Incorporating Nesterov momentum into Adam", 2016; as optax.adam(nesterov=True) has it.
    """
    if not h["nesterov"]:
        return exp_avg
    beta1 = h["betas"][0]
    return exp_avg.mul(beta1 * (1 - beta1**t) / (1 - beta1 ** (t + 1))).add_(g, alpha=1 - beta1)


def adam_step(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """The step shared by Adam and AdamW; ``g`` already holds what the rule adds to the gradient."""
    beta1, beta2 = h["betas"]
    exp_avg = state.read("exp_avg").lerp_(g, 1 - beta1)
    exp_avg_sq = state.read("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
    exp_avg = looked_ahead(state.write("exp_avg", exp_avg), g, t, h)
    exp_avg_sq = state.write("exp_avg_sq", exp_avg_sq)
    if h["amsgrad"]:
        largest = state.read("max_exp_avg_sq")
        exp_avg_sq = state.write("max_exp_avg_sq", exp_avg_sq.maximum(largest))
    denominator = (exp_avg_sq.sqrt() / sqrt(1 - beta2**t)).add_(h["eps"])
    lr = float(h["lr"])
    if state.rank_one("exp_avg_sq"):
        most = lr * longest(beta1, beta2)
        p.add_(exp_avg.div(denominator).mul_(-lr / (1 - beta1**t)).clamp_(-most, most))
    else:
        p.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**t))


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One AdamW step::

        p <- p * (1 - lr * weight_decay)
        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * g²
        p <- p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

    With ``amsgrad`` the largest v so far stands in the denominator; with ``nesterov`` m is :func:`looked_ahead`; with a
    factored v no element moves by more than lr * :func:`longest`. State: 8 bytes per parameter in 32 bits, 2.03 in 8
    bits, 1.06 in 4 bits.

    Source: Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019; amsgrad: Reddi, Kale & Kumar,
    ICLR 2018. Same order of operations as torch.optim.AdamW.
    """
    p.mul_(1 - float(h["lr"]) * h["weight_decay"])
    adam_step(p, g, state, t, h)


RULE = Rule(
    name="adamw",
    summary="Adam with decoupled weight decay",
    source="Loshchilov & Hutter 2019",
    defaults=DEFAULTS,
    moments=moments,
    moments_by=("amsgrad",),
    update=update,
    decoupled=lambda h: True,
    refuse=refuse,
    in_torch=("nesterov",),
)
