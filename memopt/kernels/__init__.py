"""Accelerated steps: the rules of :mod:`memopt.rules` on the formats of :mod:`memopt.formats`, in C++ for the CPU, and
in Triton (:mod:`memopt.kernels.triton`) for CUDA.

The plain torch path is the definition and these are a faster execution of it. ``MEMOPT_KERNELS=off`` in the
environment turns them off, ``MEMOPT_KERNELS=avx2`` or ``baseline`` chooses an instruction set. See ``docs/kernels.md``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from memopt.kernels.context import CachedStep, StepContext, StepOutcome, Stores, Streaming
from memopt.kernels.loader import library, missing

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work

__all__ = [
    "CachedStep",
    "StepContext",
    "StepOutcome",
    "Stores",
    "Streaming",
    "check_capturable",
    "library",
    "look",
    "make_cached_step",
    "missing",
    "needs_ranks",
    "on_cpu",
    "slow_path",
    "status",
    "step",
]


def make_cached_step(
    context: StepContext,
    works: Sequence[Work],
    originals: Mapping[int, Tensor],
    stores: Stores,
    before: CachedStep | None,
) -> CachedStep | None:
    """A plan for these parameters, after they have stepped; None where not all of them can go one way.

    ``originals`` are all parameters by their place, ``before`` is the plan of the step before.
    """
    from memopt.kernels import cached_step, streamed_step, triton

    ways = (triton.make_cached_step, cached_step.make, streamed_step.make)
    return next((plan for make in ways if (plan := make(context, works, originals, stores, before))), None)


def on_cpu() -> str:
    """One sentence: which code steps parameters on the CPU, and how to change that if it is the slow one."""
    found = library()
    if found is None:
        return f"the plain torch path, which is slower: {missing()}"
    return f"fused C++ kernels for {found.isa}, from {found.path}"


def status() -> str:
    """One sentence: which code steps parameters here."""
    import torch

    from memopt.kernels import triton

    return f"{on_cpu()}; on CUDA {triton.status('cuda')}" if torch.cuda.is_available() else on_cpu()


def slow_path(layout: ParamLayout, p: Tensor, ranks: int, cut_row: bool) -> str | None:
    """Why the plain torch path steps this parameter where :func:`status` says that kernels do, or None. ``ranks`` share
    it, and with ``cut_row`` one of its rows."""
    from memopt.kernels import matrix_step, pack, triton

    if layout.rule.whole_matrices and library() is not None:
        reason = matrix_step.refuse(layout, p, p)
    elif not p.is_cpu:
        reason = triton.refuse(layout, p, ranks)
    elif library() is None:
        reason = None
    elif cut_row and pack.needs_ranks(layout, ranks):
        reason = f"{layout.rule.name} needs sums, and a row that two ranks step is to be in them once"
    else:
        reason = pack.refuse(layout, p, p)
    return f"the plain torch path: {reason}" if reason else None


def check_capturable(layouts: Sequence[tuple[ParamLayout, Tensor]], world_size: int) -> None:
    """Raise RuntimeError where a step of these parameters cannot go into a CUDA graph."""
    from memopt.kernels import triton

    if world_size > 1:
        raise RuntimeError("capturable=True is for state that is not sharded: ranks agree on a step on the host")
    devices = sorted({str(p.device) for _, p in layouts})
    if len(devices) > 1:
        raise RuntimeError(f"capturable=True is for parameters on one device, and these are on {', '.join(devices)}")
    for layout, p in layouts:
        reason = triton.refuse(layout, p, world_size)
        if reason:
            raise RuntimeError(f"capturable=True needs kernels that run on the device, and for {layout.name} {reason}")
    if layouts and triton.capturing(layouts[0][1].device):
        raise RuntimeError(
            "a step that allocates state or meets new parameters cannot be captured; "
            "take a step or two before capturing"
        )


def needs_ranks(layout: ParamLayout, world_size: int) -> bool:
    """Whether the update of a parameter takes sums over the ranks that share it. The same on all of them."""
    from memopt.kernels import pack

    return pack.needs_ranks(layout, world_size) is not None


def step(
    works: Sequence[Work], world_size: int, seed: int, total: Callable[[Tensor], Tensor] | None = None
) -> list[Work]:
    """Step the parameters that the kernels can step; returns the others. ``total`` adds up over the ranks that share
    them, in their order; without it nothing that :func:`needs_ranks` may be given."""
    from memopt.kernels import triton

    return _step_on_cpu(triton.step(works, world_size, seed), seed, total)


def _step_on_cpu(works: Sequence[Work], seed: int, total: Callable[[Tensor], Tensor] | None) -> list[Work]:
    import torch

    from memopt.kernels import abi, pack

    found = library()
    if found is None or not works:
        return list(works)
    left: list[Work] = []
    groups: list[abi.Group] = []
    group_of: dict[tuple[int, float], int] = {}
    tensors = (abi.TensorStep * len(works))()
    reporting: list[tuple[int, Work]] = []
    count = 0
    for work in works:
        twice = total is not None and work.counted is not ...  # rows that are not to be in the sums here
        if twice or pack.refuse(work.layout, work.p, work.g):
            left.append(work)
            continue
        key = id(work.h), work.scale
        if key not in group_of:
            group_of[key] = len(groups)
            groups.append(pack.describe_group(work.layout.rule, work.h, work.scale))
        pack.describe_tensor(tensors[count], work, group_of[key])
        if work.layout.rule.reports:
            reporting.append((count, work))
        count += 1
    if count:
        packed = (abi.Group * len(groups))(*groups)
        over_ranks, failed = (abi.ALONE, []) if total is None else abi.over_ranks(total)
        code = found.handle.memopt_step(
            ctypes.byref(packed),
            ctypes.byref(tensors),
            count,
            seed & 0xFFFFFFFF,
            torch.get_num_threads(),
            found.index,
            over_ranks,
            False,
        )
        if failed:
            raise failed[0]
        if code:
            raise MemoryError("the kernels could not allocate their list of tensors; nothing was changed")
    for place, work in reporting:
        work.sums.add_(torch.tensor(list(tensors[place].reported), dtype=torch.float64))
    return left


def look(gradients: Sequence[Tensor], summed: bool) -> tuple[list[int], list[float], list[int]]:
    """The places of gradients that hold a NaN or an Inf, the sum of squares of each if ``summed``, and the places of
    those that were not looked at. One read of each."""
    from memopt.kernels import abi, cached_step, pack

    sums = [0.0] * len(gradients) if summed else []
    if library() is None:
        return [], sums, list(range(len(gradients)))
    mine: list[int] = []
    others: list[int] = []
    for i, g in enumerate(gradients):
        readable = g.is_cpu and g.dtype in pack.DTYPES and pack.dense(g)
        (mine if readable else others).append(i)
    if not mine:
        return [], sums, others
    spans = (abi.GradientSpan * len(mine))()
    for span, i in zip(spans, mine, strict=True):
        g = gradients[i]
        span.data, span.numel, span.dtype = g.data_ptr(), g.numel(), pack.DTYPES[g.dtype]
    bad = [mine[i] for i in cached_step.look(spans, summed)]
    if summed:
        for span, i in zip(spans, mine, strict=True):
            sums[i] = span.squares
    return bad, sums, others
