"""What a rule of matrices asks for in the middle of its update: whole matrices, those of a bucket at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memopt.kernels.newton_schulz import dtype_of, newton_schulz
from memopt.rules.matrices import matrices

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.param_step import Work

#: Elements of the matrices of one shape that are worked on in one batch. Larger ones gain nothing from company.
BATCH = 2**20


def orthogonal(asked: Sequence[tuple[Work, Tensor]]) -> list[Tensor]:
    """For each ``(work, u)``, u of [rows.local_shape], the rows here of what Newton-Schulz makes of the whole matrix,
    in the shape of u and in the dtype of the products. Matrices that are cut over ranks are put together on one of
    them;
    every rank must call this with the same works in order."""
    found: list[Any] = [None] * len(asked)
    here: list[int] = []
    cut: dict[Any, list[int]] = {}
    prepared = [_in_products(work, u) for work, u in asked]
    for i, (work, _) in enumerate(asked):
        if work.groups and not matrices(work.rows.shape).stacked:
            cut.setdefault((work.groups[0], prepared[i].dtype, prepared[i].device), []).append(i)
        else:
            here.append(i)
    whole = [matrices(asked[i][0].rows.shape).of(prepared[i]) for i in here]
    for i, x in zip(here, _batched([asked[i][0] for i in here], whole), strict=True):
        found[i] = x
    for (group, _, _), members in cut.items():
        for i, x in zip(members, _over_ranks([(asked[i][0], prepared[i]) for i in members], group), strict=True):
            found[i] = x
    return [x.reshape(u.shape).to(u.device) for (_, u), x in zip(asked, found, strict=True)]


def _in_products(work: Work, u: Tensor) -> Tensor:
    """A copy of u in the dtype and on the device of the products: that of the parameter, wherever its state is."""
    device = work.device or u.device
    return u.to(device, dtype_of(work.h, device), copy=True)


def _over_ranks(asked: Sequence[tuple[Work, Tensor]], group: Any) -> list[Tensor]:
    from memopt.partitions.exchange import Cut, on_owners

    works = [work for work, _ in asked]
    shapes = [matrices(work.rows.shape) for work in works]
    cuts = [Cut(x.reshape(-1, one.cols), one.rows, work.shares) for (work, x), one in zip(asked, shapes, strict=True)]
    costs = [float(one.rows * one.cols * min(one.rows, one.cols)) for one in shapes]

    def work_on(which: list[int], whole: list[Tensor]) -> list[Tensor]:
        return [x[0] for x in _batched([works[i] for i in which], [x[None] for x in whole])]

    return on_owners(cuts, group, costs, work_on)


def _batched(works: Sequence[Work], stacks: Sequence[Tensor]) -> list[Tensor]:
    """Newton-Schulz of each stack [count, n, m]; small ones of one shape and one param group together."""
    import torch

    batches: dict[Any, list[int]] = {}
    for i, (work, x) in enumerate(zip(works, stacks, strict=True)):
        key = id(work.h), tuple(x.shape[1:]), x.dtype, x.device
        batches.setdefault(key, []).append(i)
    found: list[Any] = [None] * len(works)
    for members in batches.values():
        for some in _up_to(BATCH, members, stacks):
            x = stacks[some[0]] if len(some) == 1 else torch.cat([stacks[i] for i in some])
            made = newton_schulz(x, works[some[0]].h) if x.numel() else x
            for i, part in zip(some, made.split([len(stacks[i]) for i in some]), strict=True):
                found[i] = part
    return found


def _up_to(numel: int, members: Sequence[int], stacks: Sequence[Tensor]) -> list[list[int]]:
    found: list[list[int]] = []
    total = 0
    for i in members:
        if not found or total + stacks[i].numel() > numel:
            found.append([])
            total = 0
        found[-1].append(i)
        total += stacks[i].numel()
    return found


__all__ = ["orthogonal"]
