"""What a rule of matrices asks for in the middle of its update: whole matrices, those of a bucket at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from memopt.core.rows import Rows
from memopt.kernels.newton_schulz import dtype_of, newton_schulz
from memopt.rules.matrices import blocks, matrices

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memopt.layout.param_step import Work

#: Elements of the matrices of one shape that are worked on in one batch: two of 1024 x 1024, each on a thread.
BATCH = 2**21


def step_in_kernels(works: Sequence[Work], seed: int) -> bool:
    """One step of all these; False, and nothing is done, where there are no kernels for some of them."""
    from memopt.kernels import matrix_step
    from memopt.rules.muon import ratio

    if any(matrix_step.refuse(work.layout, work.p, work.g) for work in works):
        return False
    ratios = [ratio(work.h, work.rows.shape) for work in works]
    prepared, joined = _room(works)
    matrix_step.update(works, prepared, seed)
    if any(_device(work).type != "cpu" for work in works):  # state and step are here, the parameters are not
        there = [u.to(_device(work)) for work, u in zip(works, prepared, strict=True)]
        found = [x.cpu() for x in _orthogonal(works, there)]
    else:
        found = _orthogonal(works, prepared, joined)
    matrix_step.apply(works, found, ratios, seed)
    return True


def orthogonal(asked: Sequence[tuple[Work, Tensor]]) -> list[Tensor]:
    """For each ``(work, u)``, u of [rows.local_shape], the rows here of what Newton-Schulz makes of the whole matrix,
    in the shape of u and in the dtype of the products. Matrices that are cut over ranks are put together on one of
    them; every rank must call this, or :func:`step_in_kernels`, with the same works in order."""
    works = [work for work, _ in asked]
    prepared = [u.to(_device(work), dtype_of(work.h, _device(work)), copy=True) for work, u in asked]
    found = _orthogonal(works, prepared)
    return [x.to(u.device) for (_, u), x in zip(asked, found, strict=True)]


def _device(work: Work) -> torch.device:
    """Where products are taken: the device of the parameter, wherever its state is."""
    return work.device or work.p.device


def _is_cut(work: Work) -> bool:
    """Whether the matrix is on several ranks; of a stack whole matrices are."""
    return bool(work.shares)


def _room(works: Sequence[Work]) -> tuple[list[Tensor], dict[tuple[int, ...], Tensor]]:
    """Memory for the update of each work, and of those that are worked on in one batch, by their places, the memory
    that they have together."""
    import torch

    found: list[Any] = [None] * len(works)
    joined = {}
    here = [i for i, work in enumerate(works) if not _is_cut(work)]
    shapes = {i: matrices(works[i].rows.shape).of_rows(works[i].rows) for i in here}
    for some in _batches({i: (works[i], shapes[i], _device(works[i])) for i in here}):
        first = works[some[0]]
        counts = [shapes[i][0] for i in some]
        room = torch.empty(sum(counts), *shapes[some[0]][1:], dtype=dtype_of(first.h, _device(first)))
        joined[tuple(some)] = room
        for i, part in zip(some, room.split(counts), strict=True):
            found[i] = part.view(works[i].rows.local_shape)
    for i, work in enumerate(works):
        if found[i] is None:
            found[i] = torch.empty(work.rows.local_shape, dtype=dtype_of(work.h, _device(work)))
    return found, joined


def _orthogonal(
    works: Sequence[Work], prepared: Sequence[Tensor], joined: Mapping[tuple[int, ...], Tensor] = MappingProxyType({})
) -> list[Tensor]:
    """The same of updates in the dtype and on the device of their products, whose memory may be used."""
    found: list[Any] = [None] * len(works)
    cut: dict[Any, list[int]] = {}
    for i, work in enumerate(works):
        if _is_cut(work):
            cut.setdefault((work.groups[0], prepared[i].dtype, prepared[i].device), []).append(i)
    here = {
        i: (works[i], matrices(works[i].rows.shape).of(prepared[i])) for i in range(len(works)) if not _is_cut(works[i])
    }
    for i, x in _batched(here, joined).items():
        found[i] = x
    for (group, _, _), members in cut.items():
        for i, x in zip(members, _over_ranks([(works[i], prepared[i]) for i in members], group), strict=True):
            found[i] = x
    return [x.reshape(u.shape) for u, x in zip(prepared, found, strict=True)]


def _over_ranks(asked: Sequence[tuple[Work, Tensor]], group: Any) -> list[Tensor]:
    from memopt.partitions.exchange import ShardedMatrix, on_owners

    works = [work for work, _ in asked]
    shapes = [matrices(work.rows.shape) for work in works]
    cuts = [
        ShardedMatrix(x.reshape(-1, one.cols), one.rows, work.shares)
        for (work, x), one in zip(asked, shapes, strict=True)
    ]
    costs = [float(one.rows * one.cols * min(one.rows, one.cols)) for one in shapes]

    def work_on(which: list[int], whole: list[Tensor]) -> list[Tensor]:
        made = _batched({n: (works[i], x[None]) for n, (i, x) in enumerate(zip(which, whole, strict=True))})
        return [made[n][0] for n in range(len(which))]

    return on_owners(cuts, group, costs, work_on)


def _batched(
    stacks: Mapping[int, tuple[Work, Tensor]], joined: Mapping[tuple[int, ...], Tensor] = MappingProxyType({})
) -> dict[int, Tensor]:
    """Newton-Schulz of each stack [count, n, m]; small ones of one shape and one param group together."""
    import torch

    found: dict[int, Tensor] = {}
    for some in _batches({i: (work, tuple(x.shape), (x.device, x.dtype)) for i, (work, x) in stacks.items()}):
        x = joined.get(tuple(some))
        if x is None:
            x = stacks[some[0]][1] if len(some) == 1 else torch.cat([stacks[i][1] for i in some])
        made = _by_block(x, stacks[some[0]][0].h) if x.numel() else x
        found.update(zip(some, made.split([len(stacks[i][1]) for i in some]), strict=True))
    return found


def _by_block(x: Tensor, h: Mapping[str, Any]) -> Tensor:
    """Newton-Schulz of what the matrices of x [count, n, m] are made of; blocks of other heights than the first are as
    large as their own factor of the rate makes them."""
    import torch

    from memopt.rules.muon import ratio

    heights = blocks(x.shape[1], h["split_rows"])
    if len(set(heights)) == 1:
        return newton_schulz(x.reshape(-1, heights[0], x.shape[2]), h).reshape(x.shape)
    whole = {**h, "split_rows": None}
    scales = [ratio(whole, (n, x.shape[2])) / ratio(whole, (heights[0], x.shape[2])) for n in heights]
    made = [newton_schulz(part.contiguous(), h) for part in x.split(heights, dim=1)]
    return torch.cat([one * scale for one, scale in zip(made, scales, strict=True)], dim=1)


def _batches(stacks: Mapping[int, tuple[Work, tuple[int, ...], Any]]) -> list[list[int]]:
    """Places of stacks ``(work, [count, n, m], where)`` that are worked on together."""
    alike: dict[Any, list[int]] = {}
    for i, (work, shape, where) in stacks.items():
        alike.setdefault((id(work.h), shape[1:], where), []).append(i)
    found: list[list[int]] = []
    for members in alike.values():
        total = BATCH + 1
        for i in members:
            count, n, m = stacks[i][1]
            if total + count * n * m > BATCH:
                found.append([])
                total = 0
            found[-1].append(i)
            total += count * n * m
    return found


def numel(work: Work, ranks: int) -> int:
    """Elements of a work's part in a bucket, the same on all ranks."""
    return -(-Rows.whole(work.rows.shape).numel // (ranks if work.groups else 1))


__all__ = ["numel", "orthogonal", "step_in_kernels"]
