"""Adafactor: a factored second moment, no first moment."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Shape
from memopt.rules.base import EXP_AVG, EXP_AVG_SQ, Hyper, Moment, Rule, State

if TYPE_CHECKING:
    from torch import Tensor

#: Those of the absolute rate; ``presets`` has what the other conventions begin with.
DEFAULTS = {
    "lr": 1e-3,
    "beta2_decay": -0.8,
    "eps": (1e-30, 1e-3),
    "d": 1.0,
    "weight_decay": 0.0,
    "beta1": None,
    "scale_parameter": False,
    "relative_step": False,
    "warmup_init": False,
    "convention": "absolute",
}
#: eps[0] None means torch.finfo(float32).eps.
FP32_EPS = 2.0**-23


def presets(given: Hyper) -> dict[str, Any]:
    convention = given.get("convention", "absolute")
    if convention == "torch":
        if given.get("warmup_init") or given.get("relative_step") is False:
            raise SpecError("adafactor: warmup_init and relative_step belong to convention='transformers'")
        if "lr" in given and given["lr"] is None:
            raise SpecError("adafactor: lr=None is not allowed with convention='torch'; lr must be a number >= 0")
        return {"lr": 1e-2, "eps": (None, 1e-3), "scale_parameter": True, "relative_step": True}
    if convention == "absolute":
        for name in ("relative_step", "warmup_init", "scale_parameter"):
            if given.get(name):
                raise SpecError(
                    f"adafactor: {name}=True makes another rate of lr, which is taken as it stands; "
                    "convention='transformers' or 'torch' has it"
                )
        if "lr" in given and given["lr"] is None:
            raise SpecError("adafactor: lr=None makes the rate from the step, which convention='transformers' does")
        return {}
    relative = given.get("relative_step", given.get("lr") is None)
    if relative and given.get("lr") is not None:
        raise SpecError(f"adafactor: lr={given['lr']!r} with relative_step=True; give one of them")
    if given.get("warmup_init") and not relative:
        raise SpecError("adafactor: warmup_init=True needs relative_step=True")
    return {"lr": None, "scale_parameter": True, "relative_step": relative}


def moments(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    return ((EXP_AVG,) if h["beta1"] is not None else ()) + (EXP_AVG_SQ,)


def relative_rate(t: int, h: Hyper) -> float:
    """The rate before it is scaled by the parameter's RMS."""
    if h["convention"] == "torch":
        return min(float(h["lr"]), 1 / sqrt(t))
    if h["relative_step"]:
        return min(1e-6 * t if h["warmup_init"] else 1e-2, 1 / sqrt(t))
    return float(h["lr"])


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One Adafactor step, with b2 = 1 - t^beta2_decay and v factored into row and column means on matrices::

        a <- max(eps2, RMS(p)) * rate            (rate alone without scale_parameter)
        v <- b2 * v + (1 - b2) * (g² + eps1)
        u <- g / sqrt(v);  u <- u / max(1, RMS(u) / d)
        m <- beta1 * m + (1 - beta1) * u         (only with beta1)
        p <- p - decay * p - a * u

    Conventions differ in the rate. ``absolute``, the default: a = lr, as transformers' Trainer sets its Adafactor up,
    so that a rate that is good for AdamW is good here. ``transformers``: rate = min(1e-2, 1/sqrt(t)) without ``lr``,
    else lr, scaled by the parameter's RMS unless scale_parameter is False; both have decay = weight_decay * a.
    ``torch``: rate = min(lr, 1/sqrt(t)), scaled likewise; v is clamped from below by eps1² and nothing is added to g²
    (eps1 = 2^-23 in whatever dtype the parameter has; torch takes the dtype's own, which on bf16 stops the step), decay
    = lr * weight_decay.

    State: 4 * (rows + columns) bytes of each matrix of the last two dimensions, 4 bytes per element of vectors;
    4 more bytes per element with ``beta1``. ``adafactor-32bit`` is the rule unfactored (PaLM).
    Source: Shazeer & Stern, "Adafactor", ICML 2018.
    """
    torch_way = h["convention"] == "torch"
    eps1, eps2 = h["eps"]
    eps1 = FP32_EPS if eps1 is None else eps1
    weight = float(t) ** h["beta2_decay"]  # 1 - b2

    rate = relative_rate(t, h)
    a = state.rms(p).clamp_(min=eps2).mul_(rate) if h["scale_parameter"] else g.new_tensor(rate)
    if torch_way:
        p.mul_(1 - float(h["lr"]) * h["weight_decay"])
        square = g.square()
    else:
        square = g.square().add_(eps1)
    exp_avg_sq = state.read("exp_avg_sq").lerp_(square, weight)
    exp_avg_sq = state.write("exp_avg_sq", exp_avg_sq, floor=eps1 if torch_way else 0.0)
    u = (exp_avg_sq.clamp(min=eps1 * eps1) if torch_way else exp_avg_sq).rsqrt().mul_(g)
    u.div_((state.rms(u) / h["d"]).clamp_(min=1.0))
    u.mul_(a)
    if h["beta1"] is not None:
        u = state.write("exp_avg", state.read("exp_avg").lerp_(u, 1 - h["beta1"]))
    if not torch_way and h["weight_decay"]:
        p.sub_(p * (a * h["weight_decay"]))
    p.sub_(u)


def kernel_fields(h: Hyper) -> dict[str, float]:
    return {"beta1": h["beta1"] or 0.0, "beta2": h["beta2_decay"], "MOMENTUM": h["beta1"] is not None}


RULE = Rule(
    name="adafactor",
    summary="factored second moment, no first moment, relative rate",
    source="Shazeer & Stern 2018",
    defaults=DEFAULTS,
    moments=moments,
    update=update,
    default_format="factored",
    element_wise=False,
    presets=presets,
    moments_by=("beta1",),
    kernel_fields=kernel_fields,
)
