"""Parameters of which a rank holds some columns only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from memopt.partitions.dtensor import is_dtensor

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.param import ParamLayout


def check_slab(layout: ParamLayout, p: Tensor, whole: Callable[[], ParamLayout]) -> None:
    """Raise RuntimeError for a parameter that is cut along another dimension than the first (tensor parallelism's
    ``Shard(1)``), unless its update and its state look at single elements: blocks, factors and whole-tensor statistics
    run along rows. ``whole`` resolves the parameter as one that is not cut."""
    if not is_dtensor(p) or layout.rows.shape == tuple(p.shape):
        return
    if layout.rule.element_wise and {m.format.name for m in whole().moments} <= {"32bit"}:
        return
    raise RuntimeError(
        f"{layout.name} is cut along another dimension than the first, with {getattr(p, 'placements', ())}, and "
        f"{layout.rule.name} in {layout.asked} works on whole rows; keep it in 32 bits with an element-wise rule: "
        f"overrides={{{layout.name!r}: '32bit'}}"
    )
