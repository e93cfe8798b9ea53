"""APOLLO: gradients of matrices, their channels as large as AdamW would make them in a random projection."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING, Any

from memopt.core import dither
from memopt.core.hyperparameters import is_number
from memopt.core.rows import Shape
from memopt.rules.base import Hyper, Moment, Rule, State
from memopt.rules.matrices import declines, matrices, projection

if TYPE_CHECKING:
    from torch import Tensor

#: The two moments of the projected gradient, by rank.
PROJECTED = Moment("projected_avg", momentum=True)
PROJECTED_SQ = Moment("projected_avg_sq", signed=False)
#: The norm of the last update, of which the next is at most ``norm_growth`` times as large.
NORM = Moment("update_norm", signed=False, fixed_format="permatrix")
#: Bits of a random word that choose one of so many quantiles of the normal distribution.
QUANTILES = 2**14
#: Elements of a gradient that are multiplied in fp64 at once.
PIECE = 2**20


def moments(h: Hyper, shape: Shape) -> tuple[Moment, ...]:
    rank = h["projection_rank"]
    both = (PROJECTED._replace(rank=rank), PROJECTED_SQ._replace(rank=rank))
    return (*both, NORM) if h["norm_growth"] else both


@lru_cache(maxsize=8)
def _normal(device: Any) -> Tensor:
    """Quantiles of the normal distribution, scaled to a variance of 1, fp64 [QUANTILES]. From Python's own arithmetic,
    so that they are the same on every device."""
    from statistics import NormalDist

    import torch

    half = [NormalDist().inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES // 2)]
    found = torch.tensor([*half, *(-x for x in reversed(half))], dtype=torch.float64)
    return (found / found.square().mean().sqrt()).to(device)


def gaussian(key: int, rank: int, device: Any) -> Callable[[int, int], Tensor]:
    """``columns(first, stop)`` of a matrix of ``rank`` rows and any number of columns whose elements are normal with a
    variance of 1 / rank, fp64. A function of ``key`` and the place of an element alone."""

    def columns(first: int, stop: int) -> Tensor:
        drawn = dither.words(key, first, stop - first, rank, device).bitwise_and_(QUANTILES - 1)
        return _normal(device)[drawn.long()].mul_(1 / sqrt(rank)).t()

    return columns


def projected(x: Tensor, state: State, key: int, rank: int) -> Tensor:
    """P x of each matrix of x [matrices, rows here, columns] where it is wider than high, [matrices, rank,
    columns]; else x Pᵀ, [matrices, rows here, rank]. fp64. Of the first the rows may be anywhere; the second are rows
    of x."""
    shape, wide = projection(state.shape, rank)
    random = gaussian(key, shape[-2] if wide else shape[-1], x.device)
    if wide:
        return state.left_product(random, x)
    p = random(0, x.shape[-1]).t()
    found = p.new_empty(*x.shape[:-1], p.shape[1])
    step = max(PIECE // max(x.shape[-1], 1), 1)
    for at in range(0, x.shape[1], step):
        found[:, at : at + step] = x[:, at : at + step].double() @ p
    return found


def update(p: Tensor, g: Tensor, state: State, t: int, h: Hyper) -> None:
    """One APOLLO step of a matrix of m rows and n columns, with r = ``projection_rank`` and P [r, m] of normal numbers
    of a variance of 1 / r, drawn anew every ``update_proj_gap`` steps (m < n; of a matrix that is not wider than high
    columns are projected and rows are scaled)::

        R <- P g
        M <- b1 * M + (1 - b1) * R
        V <- b2 * V + (1 - b2) * R²
        N <- M / (sqrt(V) + eps)
        s_j <- |column j of N| / |column j of R|       (scale_type="channel"; s <- |N| / |R| with "tensor")
        U <- scale * s * g
        U <- U * min(1, norm_growth * |U of the last step| / |U|)
        p <- p * (1 - lr * weight_decay)
        p <- p - lr * sqrt(1 - b2^t) / (1 - b1^t) * U

    Nothing of P is kept: it is a function of the optimizer's seed, the parameter's place and t, the same on every rank
    and device. The moments stay where it is drawn anew. ``apollomini`` has rank 1, one scale for a matrix and
    scale=sqrt(128); ``norm_growth=0`` does without the limit. A rank is at most the shorter side of a matrix.
    Convolutions are matrices of their output channels by all else, a tensor of three dimensions is a stack of matrices
    unless the last is a kernel's.

    For hidden matrices: what is none goes to the spec's fallback. State: 8 * r bytes for each row or column of the
    longer side in 32 bits, 2.03 * r in 8 bits, and 4 for each matrix. At rank 256 on Llama-3.1-8B ``apollo-8bit`` takes
    0.39 bytes a parameter, most of them the 8-bit AdamW's of embeddings and head. Source: Zhu et al., "APOLLO:
    SGD-like memory, AdamW-level performance", 2025 (arXiv 2412.05270), algorithm 1 and the norm-growth limiter of its
    section on loss spikes; ranks, 1.01, 200, sqrt(128) and the rate of 0.01 are its settings.

    Departures: normal numbers are one of 16,384 quantiles, so that every device has the same; Adam's bias corrections,
    which the paper leaves to AdamW, are in the step behind the limit, where the authors' package has them; a channel
    whose projection is zero is not moved.
    """
    import torch

    one = matrices(state.shape)
    x = one.of(g)
    rank, (beta1, beta2) = h["projection_rank"], h["betas"]
    _, wide = projection(state.shape, rank)
    r = projected(x, state, dither.key(state.key, (t - 1) // h["update_proj_gap"]), rank)
    flat = r.to(x.dtype).reshape(r.shape if one.stacked else r.shape[1:])
    avg = state.write("projected_avg", state.read("projected_avg").lerp_(flat, 1 - beta1))
    avg_sq = state.write("projected_avg_sq", state.read("projected_avg_sq").lerp_(flat.square(), 1 - beta2))
    normal = avg / avg_sq.sqrt().add_(h["eps"])

    along = -2 if wide else -1
    sizes = [y.double().reshape(r.shape).square().sum(along, keepdim=True) for y in (normal, r.to(x.dtype))]
    if h["scale_type"] == "tensor":  # of a high matrix, rows are elsewhere, too
        sizes = [y.sum(-1, keepdim=True) if wide else state.column_sums(y) for y in sizes]
    scale = (sizes[0] / sizes[1]).sqrt_().mul_(h["scale"])
    u = x * scale.where(sizes[1] > 0, 0.0).to(x.dtype)
    if h["norm_growth"]:
        size = state.column_sums(u.square().sum(-1, keepdim=True, dtype=torch.float64)).sqrt_()
        before = state.read("update_norm").double()
        most = before.mul(h["norm_growth"]).where(before > 0, size)
        u *= (most / size).clamp_(max=1.0).where(size > 0, 1.0).to(x.dtype)
        state.write("update_norm", size.minimum(most))
    lr = float(h["lr"])
    p.mul_(1 - lr * h["weight_decay"])
    p.sub_(u.reshape(p.shape), alpha=lr * sqrt(1 - beta2**t) / (1 - beta1**t))


def _above_zero(value: Any) -> bool:
    return is_number(value) and float(value) > 0


def _count(most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 1 <= value <= most


RULE = Rule(
    name="apollo",
    summary="gradients of hidden matrices scaled as AdamW does in a random projection; what is none has a fallback",
    source="Zhu et al. 2025",
    defaults={
        "lr": 1e-2,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "projection_rank": 256,
        "update_proj_gap": 200,
        "scale": 1.0,
        "scale_type": "channel",
        "norm_growth": 1.01,
    },
    moments=moments,
    moments_by=("norm_growth",),
    sizes_by=("projection_rank",),
    update=update,
    decoupled=lambda h: True,
    element_wise=False,
    declines=declines,
    fallback="adamw",
    checks={
        "projection_rank": ("an integer from 1 to 999999", _count(999_999)),
        "update_proj_gap": ("an integer >= 1", _count(2**31)),
        "scale": ("a finite number > 0", _above_zero),
        "scale_type": ("'channel' or 'tensor'", lambda v: v in ("channel", "tensor")),
        "norm_growth": ("a finite number > 1, or 0 for no limit", lambda v: is_number(v) and (v == 0 or float(v) > 1)),
    },
)
MINI = RULE._replace(
    name="apollomini",
    summary="apollo of rank 1, with one scale for each matrix; what is none has a fallback",
    defaults={**RULE.defaults, "projection_rank": 1, "scale": sqrt(128), "scale_type": "tensor"},
)
