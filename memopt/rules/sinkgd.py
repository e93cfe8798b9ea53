"""SinkGD: gradients of matrices with all rows and all columns made of one size; no state."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from memopt.core.rows import Shape
from memopt.rules.base import Hyper, Moment, Rule, State
from memopt.rules.matrices import declines, matrices

if TYPE_CHECKING:
    from torch import Tensor

#: The smallest normal fp32: a row or column of zeros is divided by this and stays zero.
TINY = 2.0**-126


def moments(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    return ()


def signs(like: Tensor, cols: int) -> Tensor:
    """Where the power iteration begins, [1, 1, cols]: 1 and -1 by a hash of the column. Nothing is drawn or kept, and
    columns that add up to zero, as those of a centred input do, do not add up to zero with these."""
    import torch

    odd = (torch.arange(cols, device=like.device) * 2654435761 >> 31) & 1
    return (1 - 2 * odd).to(like.dtype).view(1, 1, cols)


def normalized(x: Tensor, state: State, steps: int) -> Tensor:
    """x [matrices, rows here, columns] with rows and columns of a mean square of 1: each row is divided by its root
    mean square, then each column, ``steps`` times."""
    import torch

    rows = matrices(state.shape).rows
    square = x.square()
    row, col = x.new_ones(()), x.new_ones(())  # of squares: what they are multiplied by
    for _ in range(steps):
        row = (square * col).mean(-1, keepdim=True, dtype=torch.float64).clamp_(min=TINY).reciprocal_().to(x.dtype)
        col = (state.column_sums(square * row) / rows).clamp_(min=TINY).reciprocal_().to(x.dtype)
    return x * row.sqrt() * col.sqrt()


def spectral_norm(x: Tensor, state: State, steps: int) -> Tensor:
    """The largest singular value of each matrix, [matrices, 1, 1], as a power iteration finds it: never too large, and
    one collective of ``columns`` numbers a step where ranks share the rows."""
    import torch

    v = signs(x, x.shape[-1])
    size = x.new_ones(())
    for _ in range(steps):
        found = state.column_sums(x * (x * v).sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype))
        size = found.norm(dim=-1, keepdim=True).clamp_(min=TINY)
        v = (found / size).to(x.dtype)
    return size.sqrt().to(x.dtype)


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One SinkGD step of a matrix of R rows and C columns::

        X <- g;  sinkhorn_steps times:  X <- sqrt(C) * X / |row of X|,  X <- sqrt(R) * X / |column of X|
        X <- X * sqrt(R / C) / spectral norm of X          (only with spectral_steps, that many power iterations)
        p <- p * (1 - lr * weight_decay)
        p <- p - lr * X

    so that elements of X have a mean square of 1, five times AdamW's updates about. With ``spectral_steps`` the update
    is as large as Muon's instead, whatever the width, and so is its rate (0.02 about). Rows and columns of zeros stay
    zero; gradients under 1e-19 count as zeros, because their squares do in fp32, and of those over 1e18 the update is
    NaN. Convolutions are matrices of their output channels by all else, a tensor of three dimensions is a stack of
    matrices unless the last is a kernel's.

    For hidden matrices: what is none goes to the spec's fallback, whose format the spec's is (``sinkgd-8bit``). State:
    none but the step count, 4 bytes for each parameter; of the fallback's parameters its own. Source: Scetbon, Ma, Gong
    & Meeds, "Gradient multi-normalization for stateless and scalable LLM training", 2025, algorithms 3 and 4
    (``lr`` is there the global rate times alpha, 0.02 * 0.05; Adam steps the rest at the global one); the spectral norm
    is that of axolotl's SinkGD, whose iteration keeps its vector: here it begins anew, and nothing is kept. Weight
    decay is not in the paper.
    """
    one = matrices(state.shape)
    x = normalized(one.of(g), state, h["sinkhorn_steps"])
    if h["spectral_steps"]:
        x *= sqrt(one.rows / one.cols) / spectral_norm(x, state, h["spectral_steps"])
    lr = float(h["lr"])
    p.mul_(1 - lr * h["weight_decay"])
    p.sub_(x.reshape(p.shape), alpha=lr)


RULE = Rule(
    name="sinkgd",
    summary="gradients of hidden matrices with rows and columns of one size, no state; what is none has a fallback",
    source="Scetbon et al. 2025",
    defaults={"lr": 1e-3, "weight_decay": 0.0, "sinkhorn_steps": 5, "spectral_steps": 0},
    moments=moments,
    update=update,
    decoupled=lambda h: True,
    element_wise=False,
    declines=declines,
    fallback="adamw",
    kernel_fields=lambda h: {"iterations": h["sinkhorn_steps"], "power_iterations": h["spectral_steps"]},
    checks={
        "sinkhorn_steps": ("an integer from 1 to 99", lambda v: type(v) is int and 1 <= v < 100),
        "spectral_steps": ("an integer from 0 to 99; 0 is without", lambda v: type(v) is int and 0 <= v < 100),
    },
)
