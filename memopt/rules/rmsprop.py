"""RMSprop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memopt.core.rows import Shape
from memopt.rules.base import Hyper, Moment, Rule, State

if TYPE_CHECKING:
    from torch import Tensor

SQUARE_AVG = Moment("square_avg", signed=False, factorable=True)
GRAD_AVG = Moment("grad_avg")
MOMENTUM_BUFFER = Moment("momentum_buffer", momentum=True)


def moments(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    return (
        SQUARE_AVG,
        *((GRAD_AVG,) if h["centered"] else ()),
        *((MOMENTUM_BUFFER,) if h["momentum"] else ()),
    )


def refuse(h: Hyper, fmt: str) -> str | None:
    if h["centered"] and fmt != "32bit":
        return "centered=True subtracts two nearly equal moments, and only 32 bits keep the difference positive"
    return None


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One RMSprop step::

        g <- g + weight_decay * p
        v <- alpha * v + (1 - alpha) * g²
        a <- alpha * a + (1 - alpha) * g                                   (centered)
        u <- g / (sqrt(v - a²) + eps)                                       (a = 0 unless centered)
        p <- p - lr * u, or with momentum: b <- momentum * b + u; p <- p - lr * b

    State: 4 bytes per parameter in 32 bits, 4 more for each of ``centered`` and ``momentum``.
    Source: Tieleman & Hinton 2012; centered: Graves 2013. Same as torch.optim.RMSprop.
    """
    alpha = h["alpha"]
    if h["weight_decay"]:
        g = g.add(p, alpha=h["weight_decay"])
    square_avg = state.write("square_avg", state.read("square_avg").mul_(alpha).addcmul_(g, g, value=1 - alpha))
    if h["centered"]:
        grad_avg = state.write("grad_avg", state.read("grad_avg").lerp_(g, 1 - alpha))
        denominator = square_avg.addcmul(grad_avg, grad_avg, value=-1).clamp_(min=0).sqrt_()
    else:
        denominator = square_avg.sqrt()
    denominator.add_(h["eps"])
    if h["momentum"]:
        buffer = state.read("momentum_buffer").mul_(h["momentum"]).addcdiv_(g, denominator)
        p.sub_(state.write("momentum_buffer", buffer), alpha=float(h["lr"]))
    else:
        p.addcdiv_(g, denominator, value=-float(h["lr"]))


RULE = Rule(
    name="rmsprop",
    summary="gradient over its running root mean square",
    source="Tieleman & Hinton 2012",
    defaults={"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "centered": False},
    moments=moments,
    update=update,
    refuse=refuse,
    moments_by=("centered", "momentum"),
    kernel_fields=lambda h: {"beta1": h["alpha"], "beta2": h["alpha"]},
    rate_factor=0.25,
)
