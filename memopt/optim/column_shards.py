"""Parameters of which a rank holds some columns only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from memopt.partitions.dtensor import is_dtensor

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.param import ParamLayout


def check_slab(layout: ParamLayout, p: Tensor, whole: Callable[[], ParamLayout], groups: int = 0) -> None:
    """Raise RuntimeError for a parameter that is cut along another dimension than the first (tensor parallelism's
    ``Shard(1)``), unless its update and its state look at single elements: blocks, factors and whole-tensor statistics
    run along rows. ``whole`` resolves the parameter as one that is not cut. A matrix whose rows are cut over two groups
    (of data and of tensor parallelism) is nowhere put together."""
    if not is_dtensor(p):
        return
    if groups > 1 and layout.rule.whole_matrices:
        raise RuntimeError(
            f"{layout.name} is cut over {groups} groups of ranks, with {getattr(p, 'placements', ())}, and "
            f"{layout.rule.name} puts matrices together over one; give it another rule: "
            f"overrides={{{layout.name!r}: 'adamw'}}"
        )
    if layout.rows.shape == tuple(p.shape):
        return
    by_element = layout.rule.element_wise and not layout.rule.reports and "cautious" not in layout.modifiers
    if by_element and {m.format.name for m in whole().moments} <= {"32bit"}:
        return
    raise RuntimeError(
        f"{layout.name} is cut along another dimension than the first, with {getattr(p, 'placements', ())}, and "
        f"{layout.rule.name} in {layout.asked} works on whole rows; keep it in 32 bits with an element-wise rule: "
        f"overrides={{{layout.name!r}: {'32bit' if by_element else 'adamw-32bit'!r}}}"
    )
