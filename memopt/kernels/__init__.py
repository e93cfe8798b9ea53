"""Accelerated CPU steps: the rules of :mod:`memopt.rules` on the formats of :mod:`memopt.formats`, in C++.

The plain torch path is the definition and these are a faster execution of it. ``MEMOPT_KERNELS=off`` in the
environment turns them off, ``MEMOPT_KERNELS=avx2`` or ``baseline`` chooses an instruction set. See ``docs/kernels.md``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memopt.kernels.loader import library, missing

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.engines.work import Work
    from memopt.spec import OptimSpec

__all__ = ["library", "missing", "non_finite", "status", "step"]


def status() -> str:
    """One sentence: which code steps parameters on the CPU, and how to change that if it is the slow one."""
    found = library()
    if found is None:
        return f"the plain torch path, which is slower: {missing()}"
    return f"fused C++ kernels for {found.isa}, from {found.path}"


def step(spec: OptimSpec, works: Sequence[Work], world_size: int, seed: int) -> list[Work]:
    """Step the parameters that the kernels can step; returns the others."""
    import torch

    from memopt.engines.native import moment_formats
    from memopt.kernels import abi, describe

    found = library()
    if found is None or not works:
        return list(works)
    left: list[Work] = []
    groups: list[abi.Group] = []
    group_of: dict[int, int] = {}
    tensors = (abi.TensorStep * len(works))()
    kept: list[Tensor] = []  # copies stay alive until the kernels are done
    back: list[tuple[Tensor, Tensor]] = []
    count = 0
    for work in works:
        moments = moment_formats(spec, work.h, work.name, work.rows)
        if describe.refuse(spec, moments, work.rows, work.p, work.g, world_size):
            left.append(work)
            continue
        if id(work.h) not in group_of:
            group_of[id(work.h)] = len(groups)
            groups.append(describe.describe_group(spec, work.h))
        p, g = work.p.contiguous(), work.g.contiguous()
        if describe.describe(tensors[count], work, p, g, moments, group_of[id(work.h)]):
            left.append(work)
            continue
        kept += [p, g]
        if p is not work.p:
            back.append((work.p, p))
        count += 1
    if count:
        packed = (abi.Group * len(groups))(*groups)
        code = found.handle.memopt_step(
            ctypes.byref(packed), ctypes.byref(tensors), count, seed & 0xFFFFFFFF, torch.get_num_threads(), found.index
        )
        if code:
            raise MemoryError("the kernels could not allocate their list of tensors; nothing was changed")
    for original, stepped in back:
        original.copy_(stepped)
    return left


def non_finite(gradients: Sequence[tuple[str, Tensor]]) -> tuple[list[str], list[tuple[str, Tensor]]]:
    """The names whose gradient holds a NaN or an Inf, and the gradients that were not looked at. One read of each."""
    import torch

    from memopt.kernels import abi, describe

    found = library()
    if found is None:
        return [], list(gradients)
    mine: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for name, g in gradients:
        readable = g.is_cpu and g.dtype in describe.DTYPES and g.is_contiguous()
        (mine if readable else others).append((name, g))
    if not mine:
        return [], others
    spans = (abi.Span * len(mine))()
    for span, (_, g) in zip(spans, mine, strict=True):
        span.data, span.numel, span.dtype = g.data_ptr(), g.numel(), describe.DTYPES[g.dtype]
    if found.handle.memopt_all_finite(ctypes.byref(spans), len(mine), torch.get_num_threads(), found.index):
        return [], others
    return [name for span, (name, _) in zip(spans, mine, strict=True) if span.bad], others
