"""Stochastic gradient descent with momentum and Nesterov's variant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Shape
from memopt.rules.base import Hyper, Moment, Rule, State

if TYPE_CHECKING:
    from torch import Tensor

MOMENTUM_BUFFER = Moment("momentum_buffer", momentum=True)


def moments(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    return (MOMENTUM_BUFFER,) if h["momentum"] else ()


def refuse(h: Hyper, fmt: str) -> str | None:
    if not h["momentum"] and fmt != "32bit":
        return "sgd without momentum keeps no state; pass momentum=0.9, or use 'sgd'"
    return None


def presets(given: Hyper) -> dict[str, Any]:
    if given.get("nesterov") and (not given.get("momentum") or given.get("dampening", 0)):
        raise SpecError("sgd: nesterov=True is not allowed without momentum > 0 and dampening = 0")
    return {}


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One SGD step::

        g <- g + weight_decay * p
        b <- g at the first step, else momentum * b + (1 - dampening) * g
        p <- p - lr * (g + momentum * b if nesterov else b)

    State: none without momentum, else 4 bytes per parameter in 32 bits, 1.02 in 8 bits.
    Source: Sutskever et al. 2013, in torch.optim.SGD's form (the rate outside the buffer).
    """
    if h["weight_decay"]:
        g = g.add(p, alpha=h["weight_decay"])
    if h["momentum"]:
        buffer = state.read("momentum_buffer")
        buffer = buffer.copy_(g) if t == 1 else buffer.mul_(h["momentum"]).add_(g, alpha=1 - h["dampening"])
        buffer = state.write("momentum_buffer", buffer)
        g = g.add(buffer, alpha=h["momentum"]) if h["nesterov"] else buffer
    p.sub_(g, alpha=float(h["lr"]))


RULE = Rule(
    name="sgd",
    summary="gradient descent, with momentum and Nesterov if asked",
    source="Sutskever et al. 2013",
    defaults={"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    moments=moments,
    update=update,
    presets=presets,
    refuse=refuse,
    moments_by=("momentum",),
    example={"momentum": 0.9, "nesterov": False},
    rate_factor=150.0,
)
