"""Muon: the momentum of a matrix, made orthogonal."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from memopt.core.rows import Shape
from memopt.rules.base import Hyper, Moment, Rule, State
from memopt.rules.matrices import declines, matrices

if TYPE_CHECKING:
    from torch import Tensor

#: A mean, unlike SGD's of the same name.
MOMENTUM_BUFFER = Moment("momentum_buffer")


def ratio(h: Hyper, shape: Shape) -> float:
    """The factor of the rate for a matrix of this shape, as torch.optim.Muon's ``adjust_lr_fn`` has it: of ``original``
    sqrt(max(1, rows / columns)), of ``match_rms_adamw`` 0.2 * sqrt(max(rows, columns))."""
    one = matrices(shape)
    if h["adjust_lr_fn"] == "original":
        return sqrt(max(1.0, one.rows / one.cols))
    return 0.2 * sqrt(max(one.rows, one.cols))


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One Muon step of a matrix of R rows and C columns::

        m <- momentum * m + (1 - momentum) * g
        u <- (1 - momentum) * g + momentum * m if nesterov else m
        X <- u / max(|u|, eps);  ns_steps times:  A = X Xᵀ,  X <- a * X + (b * A + c * A A) X
        p <- p - lr * weight_decay * p
        p <- p - lr * ratio * X

    with (a, b, c) = ``ns_coefficients``, |u| the norm of all elements, and ratio sqrt(max(1, R / C)) for
    ``adjust_lr_fn="original"`` or 0.2 * sqrt(max(R, C)) for ``"match_rms_adamw"``, whose updates are as large as
    AdamW's, so that rate and decay are AdamW's too. X is taken of the transpose where R > C. Convolutions are matrices
    of their output channels by all else; a tensor of three dimensions is a stack of matrices unless the last is a
    kernel's.

    For hidden matrices: what is none goes to the spec's fallback. State: 4 bytes per element of a matrix in 32 bits,
    1.02 in 8 bits, 0.53 in 4 bits. Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks",
    2024, in torch.optim.Muon's form; Liu et al., "Muon is scalable for LLM training", 2025 (the second ratio). torch's
    default ratio is the first one.
    """
    momentum = h["momentum"]
    buffer = state.write("momentum_buffer", state.read("momentum_buffer").lerp_(g, 1 - momentum))
    x = state.orthogonal(g.lerp(buffer, momentum) if h["nesterov"] else buffer)
    lr = float(h["lr"])
    p.mul_(1 - lr * h["weight_decay"])
    p.sub_(x, alpha=lr * ratio(h, state.shape))


RULE = Rule(
    name="muon",
    summary="orthogonalised momentum of hidden matrices; what is none has a fallback",
    source="Jordan et al. 2024",
    defaults={
        "lr": 1e-3,
        "momentum": 0.95,
        "weight_decay": 0.1,
        "nesterov": True,
        "ns_coefficients": (3.4445, -4.775, 2.0315),
        "ns_steps": 5,
        "ns_dtype": "auto",
        "eps": 1e-7,
        "adjust_lr_fn": "match_rms_adamw",
    },
    moments=lambda h, shape: (MOMENTUM_BUFFER,),
    update=update,
    decoupled=lambda h: True,
    element_wise=False,
    declines=declines,
    fallback="adamw",
)
