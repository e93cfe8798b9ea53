"""Muon: the momentum of a matrix, made orthogonal."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from memopt.core.rows import Shape
from memopt.rules.base import Hyper, Moment, Rule, State
from memopt.rules.matrices import blocks, declines, matrices

if TYPE_CHECKING:
    from torch import Tensor

#: A mean, unlike SGD's of the same name.
MOMENTUM_BUFFER = Moment("momentum_buffer", momentum=True)
#: NorMuon's: one number per row, in every format.
ROW_SQ = Moment("row_sq", signed=False, fixed_format="rowmean")
#: What NorMuon adds to a root before it divides.
ROW_EPS = 1e-10


def moments(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    return (MOMENTUM_BUFFER, ROW_SQ) if h["beta2"] else (MOMENTUM_BUFFER,)


def ratio(h: Hyper, shape: Shape) -> float:
    """The factor of the rate for a matrix of this shape, as torch.optim.Muon's ``adjust_lr_fn`` has it: of ``original``
    sqrt(max(1, rows / columns)), of ``match_rms_adamw`` 0.2 * sqrt(max(rows, columns)); of dion's ``spectral_norm``
    sqrt(rows / columns), of ``none`` 1. Of a matrix that is split, that of its first block."""
    one = matrices(shape)
    rows = blocks(one.rows, h["split_rows"])[0]
    return {
        "original": sqrt(max(1.0, rows / one.cols)),
        "match_rms_adamw": 0.2 * sqrt(max(rows, one.cols)),
        "spectral_norm": sqrt(rows / one.cols),
        "none": 1.0,
    }[h["adjust_lr_fn"]]


def normalized(x: Tensor, state: State, beta2: float) -> Tensor:
    """NorMuon's update: rows as large as one another over time, the matrix as large as it was."""
    x = x.float()
    mean = state.write("row_sq", state.read("row_sq").lerp_(x.square().float(), 1 - beta2)).to(x.dtype)
    y = x / mean.sqrt_().add_(ROW_EPS)
    if matrices(state.shape).stacked:
        return y.mul_(x.norm(dim=(-2, -1), keepdim=True) / y.norm(dim=(-2, -1), keepdim=True).add_(ROW_EPS))
    return y.mul_(state.rms(x) / state.rms(y).add_(ROW_EPS))


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One Muon step of a matrix of R rows and C columns::

        m <- momentum * m + (1 - momentum) * g
        u <- (1 - momentum) * g + momentum * m if nesterov else m
        X <- u / max(|u|, eps);  ns_steps times:  A = X Xᵀ,  X <- a * X + (b * A + c * A A) X
        p <- p - lr * weight_decay * p
        p <- p - lr * ratio * X

    with (a, b, c) = ``ns_coefficients``, |u| the norm of all elements, and ratio sqrt(max(1, R / C)) for
    ``adjust_lr_fn="original"`` or 0.2 * sqrt(max(R, C)) for ``"match_rms_adamw"``, whose updates are as large as
    AdamW's, so that rate and decay are AdamW's too; sqrt(R / C) for dion's ``"spectral_norm"``, and 1 for ``"none"``. X
    is taken of the transpose where R > C. Convolutions are matrices
    of their output channels by all else; a tensor of three dimensions is a stack of matrices unless the last is a
    kernel's. With ``split_rows`` a matrix is several, one below the other: as many of one height, or of the heights
    that are given (a fused QKV projection, its heads).

    With ``beta2`` above 0 it is NorMuon, whose second moment of each row stands between the two::

        v <- beta2 * v + (1 - beta2) * mean over the row of X²
        Y <- X / (sqrt(v) + 1e-10),  X <- Y * |X| / |Y|

    For hidden matrices: what is none goes to the spec's fallback. State: 4 bytes per element of a matrix in 32 bits,
    1.02 in 8 bits, 0.53 in 4 bits; NorMuon has 4 bytes per row besides. Source: Jordan et al., "Muon: an optimizer for
    hidden layers in neural networks", 2024, in torch.optim.Muon's form; Liu et al., "Muon is scalable for LLM
    training", 2025 (the second ratio); Li et al., "NorMuon: making Muon more efficient and scalable", 2025. torch's
    default ratio is the first one.
    """
    momentum, factor = h["momentum"], ratio(h, state.shape)
    buffer = state.write("momentum_buffer", state.read("momentum_buffer").lerp_(g, 1 - momentum))
    x = state.orthogonal(g.lerp(buffer, momentum) if h["nesterov"] else buffer)
    if h["beta2"]:
        x = normalized(x, state, h["beta2"])
    lr = float(h["lr"])
    p.mul_(1 - lr * h["weight_decay"])
    p.sub_(x, alpha=lr * factor)


RULE = Rule(
    name="muon",
    summary="orthogonalised momentum of hidden matrices; what is none has a fallback",
    source="Jordan et al. 2024",
    defaults={
        "lr": 1e-3,
        "momentum": 0.95,
        "weight_decay": 0.1,
        "nesterov": True,
        "beta2": 0.0,
        "split_rows": None,
        "ns_coefficients": (3.4445, -4.775, 2.0315),
        "ns_steps": 5,
        "ns_dtype": "auto",
        "eps": 1e-7,
        "adjust_lr_fn": "match_rms_adamw",
    },
    moments=moments,
    moments_by=("beta2",),
    update=update,
    decoupled=lambda h: True,
    element_wise=False,
    declines=declines,
    fallback="adamw",
    whole_matrices=True,
)
