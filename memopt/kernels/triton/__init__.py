"""Accelerated steps on CUDA, ROCm and XPU devices, in Triton: one template for every rule and format.

Importing this package imports neither torch nor triton. What is here executes the rules of :mod:`memopt.rules` on the
formats of :mod:`memopt.formats`; the plain torch path is the definition (``docs/kernels.md``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memopt.kernels.triton.available import capturing, missing, status, version

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.kernels.context import StepContext, Stores
    from memopt.kernels.triton.cached_step import TritonCachedStep
    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work


def serves(works: Sequence[Work]) -> bool:
    """Whether any of these parameters is on a device that the kernels are for."""
    return any(missing(work.p.device.type) is None for work in works)


def refuse(layout: ParamLayout, p: Tensor, world_size: int) -> str | None:
    """Why this parameter is stepped by the plain torch path, or None."""
    reason = missing(p.device.type)
    if reason:
        return reason
    from memopt.kernels.triton import tables

    return tables.refuse(layout, p, world_size)


def step(works: Sequence[Work], world_size: int, seed: int) -> list[Work]:
    """Step the parameters that the kernels can step; returns the others."""
    if not serves(works):
        return list(works)
    from memopt.kernels.triton import cached_step

    return cached_step.step(works, world_size, seed)


def make_cached_step(
    context: StepContext,
    works: Sequence[Work],
    originals: Mapping[int, Tensor],
    stores: Stores,
    before: object,
) -> TritonCachedStep | None:
    """A prepared step for all of these parameters, or None."""
    if not serves(works):
        return None
    from memopt.kernels.triton import cached_step

    return cached_step.make(context, works, originals, stores, before)


__all__ = ["capturing", "make_cached_step", "missing", "refuse", "serves", "status", "step", "version"]
