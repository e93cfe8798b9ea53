"""SCALE: gradients with all outputs of a layer of one size, and momentum on the output head alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import is_number
from memopt.core.rows import Shape
from memopt.rules.base import EXP_AVG, Hyper, Moment, Rule, State
from memopt.rules.matrices import declines, matrices

if TYPE_CHECKING:
    from torch import Tensor

#: The least root mean square that anything is divided by.
LEAST = 1e-8


def _none(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    return ()


def _momentum(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    return (EXP_AVG,) if h["momentum"] else ()


def _apply(p: Tensor, x: Tensor, mean: Tensor, h: Hyper) -> None:
    lr = float(h["lr"])
    p.mul_(1 - lr * h["weight_decay"])
    p.sub_(x.div(mean.sqrt_().clamp_(min=LEAST).to(x.dtype)).reshape(p.shape), alpha=lr)


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One SCALE step, with G the gradient of a weight [outputs, inputs] and the mean over all inputs of an output::

        M <- momentum * M + (1 - momentum) * G         (of the output head; everything else has M = G)
        p <- p * (1 - lr * weight_decay)
        p <- p - lr * M / max(sqrt(mean of M² over the inputs), 1e-8)

    so that the elements of each output's update have a mean square of 1, five times AdamW's about. Outputs are the rows
    of a linear layer's weight, the columns of an embedding's, and a convolution's output channels; the paper, whose
    matrices stand the other way round, calls both columns. A tensor of three dimensions is a stack of matrices unless
    the last is a kernel's.

    Three rules in one: ``scale`` of hidden matrices, ``scale_head`` of the output head, whose ``momentum`` is 0.9, and
    ``scale_embedding`` of embeddings. Which is which is said by module and by name, as with ``muon``; an embedding that
    is the head too is an embedding. Vectors, norms and gates go to the spec's fallback, in the spec's format.
    Hyperparameters of one part: ``rules={"scale_head": {"momentum": 0.95}}``.

    State: none of hidden matrices and embeddings, of the head 4 bytes per element in 32 bits, 1.02 in 8 bits. Source:
    Glentis, Li, Han & Hong, "A minimalist optimizer design for LLM pretraining", 2025, algorithm 1; the root mean
    square in the place of the norm, its floor, and weight decay are those of the authors' code, whose rate is 1e-3.
    """
    import torch

    x = matrices(state.shape).of(g)
    _apply(p, x, x.square().mean(-1, keepdim=True, dtype=torch.float64), h)


def update_head(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """The same with momentum."""
    if h["momentum"]:
        g = state.write("exp_avg", state.read("exp_avg").lerp_(g, 1 - h["momentum"]))
    update(p, g, state, t, h)


def update_embedding(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """The same down the columns, whose outputs they are: sums over the vocabulary, wherever its rows are."""
    one = matrices(state.shape)
    x = one.of(g)
    _apply(p, x, state.column_sums(x.square()) / one.rows, h)


def _declines(name: str, shape: Shape, kind: str) -> str | None:
    """Of the companions: what is no matrix."""
    return declines("", shape, "")


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= float(value) < 1


RULE = Rule(
    name="scale",
    summary="gradients with outputs of one size, momentum on the head alone; vectors have a fallback",
    source="Glentis et al. 2025",
    defaults={"lr": 1e-3, "weight_decay": 0.0},
    moments=_none,
    update=update,
    decoupled=lambda h: True,
    element_wise=False,
    declines=declines,
    fallback="adamw",
    companions={"an output head": "scale_head", "an embedding": "scale_embedding"},
)
HEAD = RULE._replace(
    name="scale_head",
    summary="of scale: the output head, with momentum",
    defaults={**RULE.defaults, "momentum": 0.9},
    moments=_momentum,
    moments_by=("momentum",),
    update=update_head,
    declines=_declines,
    checks={"momentum": ("a number in [0, 1)", _is_share)},
    companions={},
    part_of="scale",
)
EMBEDDING = HEAD._replace(
    name="scale_embedding",
    summary="of scale: embeddings",
    defaults=RULE.defaults,
    moments=_none,
    moments_by=(),
    checks={},
    update=update_embedding,
)
