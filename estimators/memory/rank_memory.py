"""What one rank holds with one spec: every row of an estimate."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from math import prod
from typing import TYPE_CHECKING

from estimators.errors import InputError
from estimators.memory.memory_row import GPU, HOST, PHASES, PINNED, Row
from estimators.memory.state import state_nbytes, temporaries, weight_dtype
from estimators.models.lora import NF4
from estimators.models.model import Model, Shape
from estimators.training import Training
from estimators.units import dtype
from memopt.partitions import PARTITIONS

if TYPE_CHECKING:
    from estimators.activations import Activations
    from memopt.spec import OptimSpec


def rows_of(
    model: Model,
    spec: "OptimSpec",
    gradients: str | None,
    world_size: int,
    training: Training,
    ran: "Activations | None",
    of_the_step: int | None,
    card: str = "",
    second: "tuple[Model, Activations | None] | None" = None,
) -> list[Row]:
    """``gradients``: their dtype, or None for the weights'. ``of_the_step``: bytes that it allocates and frees, or None
    where they are not known. ``card``: its name, where that was given. ``second``: the
    reference model of preference training, and its forward pass."""
    weights = None  # the model's own dtypes
    name, known = str(spec), model.provenance
    # With activations every phase but loading is told apart, and state is there from the second step on.
    phases = PHASES[1:] if ran else ("backward", "step")
    step_phase = "backward" if training.release_gradients else "step"  # in which parameters step
    if training.deepspeed:
        held, by_dtype = _deepspeed(model, spec, weights, gradients, world_size, training.bucket, phases)
        known = "formula"
    else:
        here = _fullest(model, spec, world_size)
        held = [Row(name, "weights", kind, n, GPU, PHASES, known) for kind, n in _by_dtype(here, weights, all_=True)]
        by_dtype = _by_dtype(here, gradients, all_=False)
        if training.release_gradients:
            from estimators.memory.step_rows import released

            by_dtype = released(model, here, lambda n, shape: _nbytes(model, n, shape, gradients))
        if here is not model:
            computed = dtype(training.mixed, "mixed") if training.mixed else None
            held += _whole_at_work(model, spec, computed or weights, computed or gradients, training.pp > 1)
        elif world_size > 1 and not training.release_gradients:
            # Measured: DistributedDataParallel keeps them from its constructor on; none with gradient_as_bucket_view.
            held += [
                Row(
                    name,
                    "gradients",
                    f"{kind}, DistributedDataParallel's buckets",
                    n,
                    GPU,
                    PHASES,
                    "measured constant",
                    0,
                    n,
                )
                for kind, n in by_dtype
            ]
    if model.buffers:
        held.append(Row(name, "buffers", "", model.buffers, GPU, PHASES, model.provenance))
    few = None
    if training.release_gradients:
        from estimators.memory.step_rows import one_gradient

        few = one_gradient(name, by_dtype, known)
    away = spec.options.get("offload_gradients") is True and training.device != "cpu" and not training.deepspeed
    if away:
        few = _offloaded(model, spec, gradients, training.release_gradients, known)
    if training.deepspeed and _deepspeed_offloads(spec):
        few = []
    if ran:
        at_once = training.release_gradients and PARTITIONS[spec.partition].shards_weights * world_size < 2 and not away
        from estimators.memory.step_rows import rows

        held += rows(name, model, training, ran, by_dtype, known, few, at_once)
    elif few is not None:
        held += few
    else:
        held += [Row(name, "gradients", kind, n, GPU, ("backward", "step"), known) for kind, n in by_dtype]
    if not training.deepspeed:
        held += [
            Row(name, "state", moment, n, tier, phases, known)
            for (moment, tier), n in state_nbytes(model, spec, world_size, weights).items()
        ]
    if training.offload_params:
        held = _params_offloaded(held, model, spec, world_size, gradients)
        of_the_step = 0
    if second:
        from estimators.memory.reference_model import rows as reference_rows

        cut = PARTITIONS[spec.partition].shards_weights or (training.deepspeed and spec.partition == "zero3")
        held += reference_rows(name, second, ran, world_size if cut else 1)
    if training.seq and training.device != "cpu":
        if of_the_step:
            held.append(
                Row(
                    name,
                    "temporaries",
                    "of the step",
                    of_the_step,
                    GPU,
                    (step_phase,),
                    "measured constant",
                    0,
                    of_the_step,
                )
            )
        from estimators.memory.runtime import runtime

        held += runtime(held, model, spec, training, ran, world_size, card)
    return held


def _params_offloaded(
    rows_: list[Row], model: Model, spec: "OptimSpec", world_size: int, gradients: str | None
) -> list[Row]:
    """Shards of weights and gradients in pinned memory and the state on the host, where the step runs (FSDP2's
    CPUOffloadPolicy, DeepSpeed's offload_param at stage 3); what is gathered is on the card."""
    if not PARTITIONS[spec.partition].reshard_after_forward:
        raise InputError(f"'{spec}': offload_params is for parameters that are sharded; name a spec with /zero3")
    tiers = {"weights": PINNED, "gradients": PINNED, "state": HOST}
    stays = ("gathered", "whole, before", "bucket")
    found = [
        row._replace(tier=tiers[row.what])
        if row.tier == GPU and row.what in tiers and not row.detail.startswith(stays)
        else row
        for row in rows_
    ]
    if not any(row.detail.startswith("gathered") for row in found):  # one rank gathers from the host too
        found += _whole_at_work(model, spec, None, gradients)
    return found


def _offloaded(model: Model, spec: "OptimSpec", gradients: str | None, releases: bool, known: str) -> list[Row]:
    """Gradients that go to the host in the backward pass: on their way are as many as ``workspace`` or one of them,
    while the next is made. Those of parameters that are not ``@cpu`` stay, unless they are released."""
    from memopt.spec.placement_options import of_placement

    away = {n for n, _ in model.shapes if spec.for_parameter(n)[1] == "cpu"} - set(model.frozen)
    each = [_nbytes(model, n, shape, gradients)[1] for n, shape in model.shapes if n in away]
    largest = max(each, default=0)
    way = min(sum(each), max(of_placement(spec.options, "cpu")["workspace"], largest) + largest)
    found = [Row(str(spec), "gradients", "on their way to the host", way, GPU, ("backward",), "formula", largest, way)]
    rest = model._replace(frozen=frozenset({*model.frozen, *away}))
    if releases:
        from estimators.memory.step_rows import one_gradient, released

        left = released(rest, rest, lambda n, shape: _nbytes(model, n, shape, gradients))
        return [*found, *one_gradient(str(spec), left, known)]
    stay = _by_dtype(rest, gradients, all_=False)
    return [*found, *(Row(str(spec), "gradients", kind, n, GPU, ("backward", "step"), known) for kind, n in stay)]


def _deepspeed_offloads(spec: "OptimSpec") -> bool:
    from estimators.memory.deepspeed import offloads

    return offloads(spec)


def step_temporaries(
    model: Model, spec: "OptimSpec", world_size: int, weights: str | None, training: Training
) -> int | None:
    if training.deepspeed:
        from estimators.memory import deepspeed

        return deepspeed.step_temporaries(model, spec, world_size)
    return temporaries(model, spec, world_size, weights)


def _deepspeed(
    model: Model,
    spec: "OptimSpec",
    weights: str | None,
    gradients: str | None,
    world_size: int,
    bucket: int,
    phases: tuple[str, ...],
) -> tuple[list[Row], list[tuple[str, int]]]:
    """The rows of DeepSpeed's own figures, and the gradients of a backward pass."""
    from estimators.memory import deepspeed

    def sizes(given: str | None) -> dict[str, float]:
        return {n: _itemsize(weight_dtype(model, n, given)) for n, _ in model.shapes}

    itemsize = sizes(weights)
    trained = [size for n, size in itemsize.items() if n not in model.frozen]
    widest = int(max(trained, default=2))
    return (
        deepspeed.weights(model, spec, world_size, itemsize)
        + deepspeed.rest(model, spec, world_size, bucket, widest, phases),
        deepspeed.gradients(model, spec, world_size, sizes(gradients)),
    )


def _fullest(model: Model, spec: "OptimSpec", world_size: int) -> Model:
    """The model whose parameters are the rows of the fullest rank, which is the first."""
    from memopt.partitions import PARTITIONS

    if not PARTITIONS[spec.partition].shards_weights or world_size == 1:
        return model
    rows = PARTITIONS[spec.partition].rows
    return model._replace(
        shapes=tuple((name, rows(shape, 0, model.ranks(name, world_size)).local_shape) for name, shape in model.shapes)
    )


def _whole_at_work(
    model: Model, spec: "OptimSpec", weights: str | None, gradients: str | None, pipeline: bool = False
) -> list[Row]:
    """Weights and gradients that FSDP2 holds whole while blocks compute. In a ``pipeline`` both stay for all
    micro-batches of a step; gradients are added up in the dtype in which they are reduced, which is the weights' own
    unless the policy says another (``reduce_dtype``)."""
    from estimators.memory.sharding import gathered, unreduced

    def sizes(given: str | None, all_: bool) -> list[tuple[str, int]]:
        return [(n, _nbytes(model, n, shape, given)[1]) for n, shape in model.shapes if all_ or n not in model.frozen]

    name, reshard = str(spec), PARTITIONS[spec.partition].reshard_after_forward
    if pipeline:
        whole, raw = sum(n for _, n in sizes(weights, True)), sum(n for _, n in sizes(gradients, False))
        most = max(raw, sum(n for _, n in sizes("float32", False)))
        return [
            Row(name, "weights", "gathered, of all layers", whole, GPU, PHASES[1:4], "formula"),
            Row(name, "gradients", "whole, before they are reduced", most, GPU, PHASES[1:4], "formula", raw, most),
        ]
    whole, raw = gathered(sizes(weights, True), reshard=reshard), unreduced(sizes(gradients, False))
    detail = "gathered, two blocks" if reshard else "gathered"
    return [
        Row(name, "weights", detail, whole, GPU, PHASES[1:4], "formula"),
        Row(name, "gradients", "whole, before they are reduced", raw, GPU, ("backward",), "formula"),
    ]


def _by_dtype(model: Model, given: str | None, *, all_: bool) -> list[tuple[str, int]]:
    """Bytes by dtype: of all parameters, or of those that train."""
    count: dict[tuple[str, Shape], int] = {}
    for name, shape in model.shapes:
        if all_ or name not in model.frozen:
            key = (weight_dtype(model, name, given), shape)
            count[key] = count.get(key, 0) + 1
    totals: dict[str, int] = {}
    for (kind, shape), times in count.items():
        totals[kind] = totals.get(kind, 0) + times * _sized(kind, shape)
    return list(totals.items())


def _nbytes(model: Model, name: str, shape: Shape, given: str | None) -> tuple[str, int]:
    """dtype and bytes of one parameter, or of its gradient."""
    kind = weight_dtype(model, name, given)
    return kind, _sized(kind, shape)


def _sized(kind: str, shape: Shape) -> int:
    return -int(-prod(shape) * _itemsize(kind) // 1)


def _itemsize(kind: str) -> float:
    """Bytes of one element, the scales of 4-bit weights included."""
    from memopt.core.ledger import ITEMSIZE

    if kind in NF4:
        return NF4[kind]
    if kind not in ITEMSIZE:
        raise InputError(f"a parameter has the dtype {kind}; known are {', '.join(ITEMSIZE)}")
    return ITEMSIZE[kind]
