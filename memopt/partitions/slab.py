"""Parameters of which a rank holds some columns only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memopt.engines.native import moment_formats
from memopt.geometry import Rows
from memopt.partitions.dtensor import is_dtensor
from memopt.rules import RULES

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.spec import OptimSpec


def check_slab(spec: OptimSpec, h: Mapping[str, Any], name: str, rows: Rows, p: Tensor) -> None:
    """Raise RuntimeError for a parameter that is cut along another dimension than the first (tensor parallelism's
    ``Shard(1)``), unless its update and its state look at single elements: blocks, factors and whole-tensor statistics
    run along rows."""
    if not is_dtensor(p) or rows.shape == tuple(p.shape):
        return
    formats = {fmt.name for _, fmt, _ in moment_formats(spec, h, name, Rows.whole(tuple(p.shape)))}
    if RULES[spec.rule].element_wise and formats <= {"32bit"}:
        return
    raise RuntimeError(
        f"{name} is cut along another dimension than the first, with {getattr(p, 'placements', ())}, and "
        f"'{spec}' works on whole rows; keep it in 32 bits with an element-wise rule: "
        f"overrides={{{name!r}: '32bit'}}"
    )
