"""Adam, with weight decay as an L2 term in the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memopt.rules import adamw
from memopt.rules.base import Hyper, Rule, State

if TYPE_CHECKING:
    from torch import Tensor


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One Adam step: ``g <- g + weight_decay * p``, then AdamW's step without its decay.

    State: as AdamW's. Source: Kingma & Ba, "Adam", ICLR 2015. Same as torch.optim.Adam; bitsandbytes' ``Adam``
    decouples its decay and is our ``adamw``.
    """
    if h["weight_decay"]:
        g = g.add(p, alpha=h["weight_decay"])
    adamw.adam_step(p, g, state, t, h)


RULE = Rule(
    name="adam",
    summary="Adam; weight decay is an L2 term in the gradient",
    source="Kingma & Ba 2015",
    defaults={**adamw.DEFAULTS, "weight_decay": 0.0},
    moments=adamw.moments,
    moments_by=("amsgrad",),
    update=update,
    in_torch=("nesterov",),
    refuse=adamw.refuse,
)
