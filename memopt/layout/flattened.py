"""Parameters that DeepSpeed has flattened: which specs can step its vectors, and what a rank has of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Rows, Shape
from memopt.layout.param import resolve_layout
from memopt.partitions.deepspeed import spans
from memopt.rules import RULES

if TYPE_CHECKING:
    from memopt.spec import OptimSpec

#: Stages that flatten parameters.
_FLATTENING = (1, 2, 3)


def needs_shapes(spec: OptimSpec) -> str | None:
    """Why a spec cannot step flat vectors in place of the parameters without knowing what is in them; None where it
    can."""
    if spec.is_mixed:
        return "has rules by parameter, and flat vectors are of many"
    if spec.overrides:
        return "has overrides by name, and flat vectors have none"
    if spec.hyper.get("cautious"):
        return "needs the parameters' shapes: cautious=True takes a share of the whole tensor"
    if not RULES[spec.rule].element_wise:
        return f"needs the parameters' shapes: {spec.rule} takes statistics of whole tensors"
    layout = resolve_layout(spec, spec.resolve(), "", 0, Rows.whole((4096, 4096)), "float32")
    formats = {m.format.name for m in layout.moments}
    whole = formats & {"factored", "rowmean"}
    return f"needs the parameters' shapes: a moment is held as {whole.pop()}" if whole else None


def refuse_deepspeed(spec: OptimSpec) -> str | None:
    """Why a spec cannot be stepped under DeepSpeed at all, or None."""
    for name in spec.rule_names:
        if RULES[name].reports:
            return f"{name} ends a step with sums over all parameters, and DeepSpeed steps its vectors one by one"
        if RULES[name].declines is not None and not RULES[name].whole_matrices:
            return f"{name} sums columns of matrices, whose rows DeepSpeed cuts anywhere"
    return None


def rows_of_rank(
    spec: OptimSpec,
    shapes: Mapping[str, Shape],
    rank: int,
    world_size: int,
    stage: int,
    rules: Mapping[str, str] | None = None,
) -> list[tuple[str, Rows]]:
    """What a rank steps of these parameters, all in one group or in one for each of ``rules``: ``(name, rows)``. Flat
    vectors, called by their number; of a spec that needs shapes, the rows of the parameters behind them. Raises
    SpecError for a spec or a stage that flattens nothing."""
    if stage not in _FLATTENING or isinstance(stage, bool):
        raise SpecError(f"deepspeed={stage!r} is not allowed; it is DeepSpeed's stage, one of 1, 2, 3")
    if spec.partition != "none":
        raise SpecError(f"'{spec}' with deepspeed={stage}: the stage takes the place of /{spec.partition}")
    if reason := refuse_deepspeed(spec):
        raise SpecError(f"'{spec}' with deepspeed={stage}: {reason}")
    if not needs_shapes(spec):
        found = spans.vectors(list(shapes.values()), world_size, stage)
        return [(str(i), Rows.whole((numel,))) for i, numel in enumerate(found)]
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault((rules or {}).get(name, spec.rule), []).append(name)
    mine: dict[str, Rows | None] = {}
    for names in groups.values():
        rows_of_group = spans.rows_of_rank([shapes[name] for name in names], rank, world_size, stage)
        mine.update(zip(names, rows_of_group, strict=True))
    return [(name, rows) for name in shapes if (rows := mine[name]) is not None]
