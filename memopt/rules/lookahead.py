"""Lookahead: any rule, with slow weights that follow every few steps and to which the fast ones return."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Shape
from memopt.rules.base import Hyper, Moment, Rule, State

if TYPE_CHECKING:
    from torch import Tensor

SLOW = Moment(
    "slow",
    fixed_format="32bit",
    fixed_because="slow weights are weights, and rounding them would round the model",
    begins="the parameter",
)


def wrap(inner: Rule) -> Rule:
    """``lookahead(inner)``: the rule ``inner``, and after every ``lookahead_steps`` of its steps::

        s <- s + lookahead_rate * (p - s)
        p <- s

    The slow weights s begin as the parameters. They are a moment like any other: in state, in the ledger and in the
    price, 4 bytes per parameter in every format. With ``lookahead_rate`` 1 this is ``inner``.
    Source: Zhang, Lucas, Hinton & Ba, "Lookahead optimizer: k steps forward, 1 step back", NeurIPS 2019.
    """

    if inner.declines is not None:
        raise SpecError(f"lookahead({inner.name}): {inner.name} does not take every parameter, and has no slow weights")

    if inner.reports:
        raise SpecError(f"lookahead({inner.name}): {inner.name} follows its own steps, and not those of slow weights")

    def moments(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
        return (*inner.moments(h, shape), SLOW)

    def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
        if t == 1:
            state.write("slow", p)
        inner.step(p, g, state, t, h)
        if t % h["lookahead_steps"] == 0:
            slow = state.read("slow").lerp_(p, h["lookahead_rate"])
            state.write("slow", slow)
            p.copy_(slow)

    return inner._replace(
        name=f"lookahead({inner.name})",
        wrapper="lookahead",
        wrapped=inner.name,
        summary=f"{inner.summary}; slow weights every few steps",
        source=f"Zhang et al. 2019; {inner.source}",
        defaults={**inner.defaults, "lookahead_steps": 5, "lookahead_rate": 0.5},
        moments=moments,
        update=update,
    )
