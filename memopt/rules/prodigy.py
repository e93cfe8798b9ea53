"""Prodigy: AdamW that finds its own rate, from how far the weights have to go."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import is_number
from memopt.core.rows import Shape
from memopt.rules.adamw import longest
from memopt.rules.base import Hyper, Moment, Rule, State

if TYPE_CHECKING:
    from torch import Tensor

#: Gradients are weighted by d, so these are no means of gradients alone.
EXP_AVG = Moment("exp_avg", mean_of="a mean of gradients times d", momentum=True)
EXP_AVG_SQ = Moment("exp_avg_sq", signed=False, factorable=True, mean_of="a mean of squared gradients times d²")
GRADIENTS = Moment("grad_sum", mean_of="a weighted sum of gradients")
MOVED = Moment("moved", mean_of="the way from where the weights began")


def moments(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    statistics: tuple[Moment, ...] = (GRADIENTS, MOVED)
    if h["sliced"]:
        why = "sliced=True keeps it of every 11th element"
        statistics = tuple(m._replace(fixed_format="sliced", fixed_because=why) for m in statistics)
    return (EXP_AVG, EXP_AVG_SQ, *statistics)


def distance(h: Mapping[str, Any]) -> float:
    """d, the estimate of how far the weights have to go."""
    return float(h["d0"] if h["d"] is None else h["d"])


def rate(t: int, h: Hyper) -> float:
    """What stands for the rate: lr * d, with Adam's bias corrections if they are asked for."""
    beta1, beta2 = h["betas"]
    found = float(h["lr"]) * distance(h)
    return found * sqrt(1 - beta2**t) / (1 - beta1**t) if h["use_bias_correction"] else found


def slow_beta(h: Mapping[str, Any]) -> float:
    """b3, of the statistics of the estimate."""
    return float(sqrt(h["betas"][1]) if h["beta3"] is None else h["beta3"])


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One Prodigy step, with a = lr * d (times sqrt(1 - b2^t) / (1 - b1^t) with ``use_bias_correction``), and x0 the
    weights as they began::

        n <- b3 * n + d / d0 * a * <g, x0 - p>               (the inner product over all parameters)
        s <- b3 * s + d / d0 * a * g                           (with ``safeguard_warmup`` d in the place of a)
        m <- b1 * m + (1 - b1) * d * g
        v <- b2 * v + (1 - b2) * d² * g²
        p <- p * (1 - a * weight_decay)
        p <- p - a * m / (sqrt(v) + d * eps)
        d <- max(d, d_coef * n / |s|)                          (the sum of magnitudes over all parameters)

    d begins at ``d0`` and stands in ``param_groups`` as ``"d"``, n as ``"d_numerator"``; both are saved with them. lr
    is 1, or a schedule's share of it. Without ``decoupled_weight_decay`` the decay is an L2 term in the gradient. With
    a factored v no element moves by more than a * :func:`~memopt.rules.adamw.longest`.

    State: 16 bytes per parameter in 32 bits, 4.06 in 8 bits; with ``sliced`` the statistics s and x0 - p are kept of
    every 11th element of a row, in 32 bits: 8.73 and 2.76. Source: Mishchenko & Defazio, "Prodigy: an expeditiously
    adaptive parameter-free learner", ICML 2024, algorithm 4; options and their names as in the package prodigyopt.

    Departures: x0 - p is kept and not x0, as the sum of the steps taken, which can be rounded to 8 bits without losing
    what is small: weights that somebody else changes are not followed, and of 16-bit weights without a master it is the
    steps that were meant. eps is multiplied by the d of this step, as the paper has it; prodigyopt takes the next one.
    """
    beta1, beta2 = h["betas"]
    d, a = distance(h), rate(t, h)
    if h["weight_decay"] and not h["decoupled_weight_decay"]:
        g = g.add(p, alpha=h["weight_decay"])
    weight = d / float(h["d0"])
    moved = state.read("moved")
    toward = (g * moved).sum(dtype=_double()) * (weight * a)
    sums = state.read("grad_sum").mul_(slow_beta(h)).add_(g, alpha=weight * (d if h["safeguard_warmup"] else a))
    sums = state.write("grad_sum", sums)
    state.report([toward, sums.abs().sum(dtype=_double())])
    exp_avg = state.write("exp_avg", state.read("exp_avg").mul_(beta1).add_(g, alpha=d * (1 - beta1)))
    exp_avg_sq = state.read("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=d * d * (1 - beta2))
    exp_avg_sq = state.write("exp_avg_sq", exp_avg_sq)
    before = p.clone()
    if h["weight_decay"] and h["decoupled_weight_decay"]:
        p.sub_(p * (a * h["weight_decay"]))  # too small at first to be taken from 1
    denominator = exp_avg_sq.sqrt().add_(d * h["eps"])
    if state.rank_one("exp_avg_sq"):
        most = a * longest(beta1, beta2)
        p.add_(exp_avg.div(denominator).mul_(-a).clamp_(-most, most))
    else:
        p.addcdiv_(exp_avg, denominator, value=-a)
    state.write("moved", moved.add_(before.sub_(p)))


def _double() -> Any:
    import torch

    return torch.float64


def after_step(groups: Sequence[MutableMapping[str, Any]], sums: Sequence[float]) -> None:
    """The next d, from what the parameters have reported: the new part of n, and |s|. The same in all groups, those
    that are new among them. Rounded to fp32, in which the order of a sum does not show."""
    import struct

    toward, size = sums
    most = max(groups, key=distance)
    numerator = slow_beta(most) * most["d_numerator"] + toward
    d = distance(most)
    if size > 0:
        found = max(d, float(most["d_coef"]) * numerator / size)
        d = struct.unpack("f", struct.pack("f", found))[0] if found > d else d
    for group in groups:
        group["d"], group["d_numerator"] = d, numerator


def _number_above_zero(value: Any) -> bool:
    return is_number(value) and float(value) > 0


RULE = Rule(
    name="prodigy",
    summary="AdamW that finds its own rate; lr is 1",
    source="Mishchenko & Defazio 2024",
    defaults={
        "lr": 1.0,
        "betas": (0.9, 0.999),
        "beta3": None,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled_weight_decay": True,
        "use_bias_correction": False,
        "safeguard_warmup": False,
        "d0": 1e-6,
        "d_coef": 1.0,
        "sliced": False,
        "d": None,
        "d_numerator": 0.0,
    },
    moments=moments,
    moments_by=("sliced",),
    update=update,
    decoupled=lambda h: bool(h["decoupled_weight_decay"]),
    checks={
        "beta3": ("None or a number in [0, 1)", lambda v: v is None or (is_number(v) and 0 <= float(v) < 1)),
        "use_bias_correction": ("True or False", lambda v: isinstance(v, bool)),
        "safeguard_warmup": ("True or False", lambda v: isinstance(v, bool)),
        "sliced": ("True or False", lambda v: isinstance(v, bool)),
        "d0": ("a finite number > 0", _number_above_zero),
        "d_coef": ("a finite number > 0", _number_above_zero),
        "d": (
            "None, or the finite number > 0 at which the estimate stands",
            lambda v: v is None or _number_above_zero(v),
        ),
        "d_numerator": ("a finite number", is_number),
    },
    kernel_fields=lambda h: {
        "d": distance(h),
        "beta3": slow_beta(h),
        "d0": float(h["d0"]),
        "corrected": float(h["use_bias_correction"]),
        "safeguard": float(h["safeguard_warmup"]),
    },
    reports=2,
    after_step=after_step,
    estimate=distance,
    rate_factor=1000.0,
)
