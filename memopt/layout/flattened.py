"""Parameters that DeepSpeed has flattened: which specs can step its vectors, and what a rank has of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Rows, Shape
from memopt.layout.param import resolve
from memopt.partitions.deepspeed import spans
from memopt.rules import RULES

if TYPE_CHECKING:
    from memopt.spec import OptimSpec

#: Stages that flatten parameters.
_FLATTENING = (1, 2, 3)


def needs_shapes(spec: OptimSpec) -> str | None:
    """Why a spec cannot step flat vectors in place of the parameters without knowing what is in them; None where it
    can."""
    if spec.overrides:
        return "has overrides by name, and flat vectors have none"
    if not RULES[spec.rule].element_wise:
        return f"needs the parameters' shapes: {spec.rule} takes statistics of whole tensors"
    layout = resolve(spec, spec.resolve(), "", 0, Rows.whole((4096, 4096)), "float32")
    held = {m.format.name for m in layout.moments}
    whole = held & {"factored", "rowmean"}
    return f"needs the parameters' shapes: a moment is held as {whole.pop()}" if whole else None


def rows_of_rank(
    spec: OptimSpec, shapes: Mapping[str, Shape], rank: int, world_size: int, stage: int
) -> list[tuple[str, Rows]]:
    """What a rank steps of these parameters, all in one group: ``(name, rows)``. Flat vectors, called by their number;
    of a spec that needs shapes, the rows of the parameters behind them. Raises SpecError for a spec or a stage that
    flattens nothing."""
    if stage not in _FLATTENING or isinstance(stage, bool):
        raise SpecError(f"deepspeed={stage!r} is not allowed; it is DeepSpeed's stage, one of 1, 2, 3")
    if spec.partition != "none":
        raise SpecError(f"'{spec}' with deepspeed={stage}: the stage takes the place of /{spec.partition}")
    if not needs_shapes(spec):
        found = spans.vectors(list(shapes.values()), world_size, stage)
        return [(str(i), Rows.whole((numel,))) for i, numel in enumerate(found)]
    mine = spans.rows_of_rank(list(shapes.values()), rank, world_size, stage)
    return [(name, rows) for name, rows in zip(shapes, mine, strict=True) if rows is not None]
