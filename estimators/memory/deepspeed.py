"""Weights, gradients, buffers and state of one rank when DeepSpeed runs the step (``--deepspeed``).

The stage is the spec's partition. DeepSpeed hands the optimizer one flat fp32 tensor of this rank's share of all
parameters (rules that need shapes step the rows behind it), and keeps that share itself beside weights in 16 bits.
Source: runtime/zero/stage_1_and_2.py and stage3.py of DeepSpeed 0.19. With Adam in 16 bits, without buckets and
gathered weights, the rows of stage 2 add up to its estimate_zero2_model_states_mem_needs (2N + 18N/w; offloaded 2N on
the GPU), those of stage 3 to its estimate_zero3_model_states_mem_needs (18N/w, which leaves out this rank's 16-bit
gradients, 2N/w; offloaded 2N/w).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from estimators.errors import InputError
from estimators.memory.memory_row import GPU, PHASES, Row
from estimators.memory.sharding import LIVE, PERSISTENT
from estimators.memory.state import DEVICE, candidate_ranks, state_nbytes, temporaries, tier
from estimators.models.model import Model
from memopt.partitions.deepspeed.spans import share

if TYPE_CHECKING:
    from memopt.spec import OptimSpec

_STAGES = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}
_FP32 = 4


def stage(spec: OptimSpec) -> int:
    """The ZeRO stage of a spec. Raises :class:`InputError` for one that DeepSpeed cannot run."""
    if spec.partition not in _STAGES:
        raise InputError(f"'{spec}': DeepSpeed has no stage for {spec.partition}; it has {', '.join(_STAGES)}")
    if spec.master not in ("none", "fp32"):
        raise InputError(f"'{spec}': DeepSpeed keeps an fp32 copy of the weights itself; leave out +{spec.master}")
    return _STAGES[spec.partition]


def flat(model: Model, spec: OptimSpec, world_size: int) -> Model:
    """What the optimizer sees: this rank's share of all parameters that train, one fp32 tensor."""
    numel = sum(prod(shape) for name, shape in model.shapes if name not in model.frozen)
    part = share(numel, world_size if stage(spec) else 1)
    return model._replace(shapes=(("flat", (part,)),), frozen=frozenset(), dtypes={"flat": "float32"}, config=None)


def weights(model: Model, spec: OptimSpec, world_size: int, itemsize: dict[str, float]) -> list[Row]:
    """``itemsize``: bytes per element by name. From stage 3 on parameters of up to 1e5 elements stay whole, others are
    cut one by one; up to 1e9 elements stay gathered, because they are needed again soon."""
    name, known = str(spec), "formula"
    sharded = stage(spec) == 3 and world_size > 1
    held = gathered = 0.0
    for parameter, shape in model.shapes:
        numel, size = prod(shape), itemsize[parameter]
        cut = sharded and numel > PERSISTENT
        held += (-(-numel // world_size) if cut else numel) * size
        gathered += numel * size * cut
    rows = [Row(name, "weights", "DeepSpeed's share" if sharded else "whole", -int(-held // 1), GPU, PHASES, known)]
    if sharded:
        most = min(int(gathered), LIVE * 2)
        rows.append(Row(name, "weights", "gathered, up to 1e9 elements", most, GPU, PHASES[1:4], known, 0, most))
    return rows


def gradients(model: Model, spec: OptimSpec, world_size: int, itemsize: dict[str, float]) -> list[tuple[str, int]]:
    """Gradients in the weights' dtype at the end of a backward pass: all of them up to stage 1, then a share."""
    total = sum(prod(shape) * itemsize[n] for n, shape in model.shapes if n not in model.frozen)
    cut = stage(spec) >= 2
    return [("whole" if not cut else "this rank's share", -int(-total // (world_size if cut else 1)))]


def offloads(spec: OptimSpec) -> bool:
    """Whether gradients go to the host as they are reduced: to DeepSpeed's fp32 copy there (offload_optimizer)."""
    return stage(spec) >= 2 and spec.placement in ("cpu", "host", "disk")


def rest(
    model: Model, spec: OptimSpec, world_size: int, bucket: int, itemsize: int, phases: tuple[str, ...]
) -> list[Row]:
    """The fp32 copy, its gradient, the buckets and the optimizer's own state. ``bucket``: elements."""
    name, seen = str(spec), flat(model, spec, world_size)
    numel = seen.shapes[0][1][0]
    state = _state(model, seen, spec, world_size)
    mixed = itemsize < _FP32 or stage(spec) > 0
    rows = [Row(name, "state", moment, n, tier, phases, "formula") for (moment, tier), n in state.items()]
    if mixed:
        # Beside the moments: where those are offloaded, DeepSpeed's copy and its gradient are too.
        tier = next((tier for (moment, tier), _ in state.items() if moment != "step"), GPU)
        rows.append(Row(name, "state", "DeepSpeed's fp32 copy", _FP32 * numel, tier, PHASES, "formula"))
        at_once = min(numel, LIVE) if stage(spec) == 3 else numel
        rows.append(
            Row(
                name,
                "gradients",
                "fp32, of the copy",
                _FP32 * at_once,
                tier,
                ("backward", "step") if offloads(spec) else ("step",),
                "formula",
            )
        )
    if stage(spec):
        rows.append(
            Row(name, "temporaries", "bucket of gradients to reduce", bucket * itemsize, GPU, ("backward",), "formula")
        )
    return rows


def _by_rows(spec: OptimSpec) -> bool:
    from memopt.layout.flattened import needs_shapes

    return stage(spec) > 0 and needs_shapes(spec.replace(partition="none")) is not None


def _state(model: Model, seen: Model, spec: OptimSpec, world_size: int) -> dict[tuple[str, str], int]:
    """(moment, tier) -> bytes on the fullest rank."""
    plain = spec.replace(partition="none", master="none")
    if not _by_rows(spec):
        return state_nbytes(seen, plain, 1)
    from memopt.pricing.price import price

    shapes = {name: shape for name, shape in model.shapes if name not in model.frozen}
    found = []
    for rank in candidate_ranks(world_size):
        totals: dict[tuple[str, str], int] = {}
        for n in price(shapes, plain, world_size=world_size, rank=rank, device=DEVICE, deepspeed=stage(spec)):
            totals[n.moment, tier(n)] = totals.get((n.moment, tier(n)), 0) + n.nbytes
        found.append(totals)
    return max(found, key=lambda totals: sum(totals.values()))


def step_temporaries(model: Model, spec: OptimSpec, world_size: int) -> int | None:
    """Of the plain path on the flat share, which is stepped at once; at stage 3 by sub-groups of 1e9 elements."""
    seen = flat(model, spec, world_size)
    if _by_rows(spec):
        # Rows with their gradients are copied, as of weights in 16 bits, and stepped together where sums go over ranks.
        return temporaries(model, spec.replace(partition="zero3", master="none"), world_size, "bfloat16")
    if stage(spec) == 3:
        seen = seen._replace(shapes=(("flat", (min(LIVE, seen.shapes[0][1][0]),)),))
    return temporaries(seen, spec.replace(partition="none", master="none"), 1, None)
