"""Optimizer state and the temporaries of its step, on the fullest rank."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from estimators.memory.memory_row import GPU, HOST, PAGEABLE
from estimators.models.lora import NF4
from estimators.models.model import Model, Shape

if TYPE_CHECKING:
    from memopt.core.ledger import Line, TensorSpec
    from memopt.core.rows import Rows
    from memopt.spec import OptimSpec

#: Where the parameters are said to be when state is priced.
DEVICE = "cuda"
_MAX_RANKS_PRICED = 32

#: rule -> format -> bytes that the plain torch path allocates and frees while it steps one fp32 parameter, per element
#: of the piece that is stepped at a time (``memopt/engines/row_chunks.py``; the whole where a rule needs it). Measured
#: with torch 2.13 (the allocations of a step traced); tests measure them again. Parameters are stepped one after the
#: other, so the largest counts. Sums over a whole parameter are in fp64, of a copy. The C++ kernels, which step
#: parameters on the CPU, allocate nothing.
_ADAM = {"32bit": 8, "bf16": 24, "8bit": 28, "fp8": 32, "4bit": 28, "factored": 12}
_SIGN = {"32bit": 4, "bf16": 20, "8bit": 24, "fp8": 28, "4bit": 24}
PLAIN_PATH: dict[str, dict[str, int]] = {
    "adamw": _ADAM,
    "adam": _ADAM,
    "adafactor": {"32bit": 20, "bf16": 24, "8bit": 25, "fp8": 32, "4bit": 27, "factored": 24},
    "came": {"32bit": 20, "bf16": 36, "8bit": 37, "fp8": 44, "4bit": 39, "factored": 24},
    "lion": _SIGN,
    "sgd": {**_SIGN, "32bit": 0},
    "rmsprop": {"32bit": 4, "bf16": 20, "8bit": 21, "fp8": 28, "4bit": 23, "factored": 12},
    "radam": {**_ADAM, "32bit": 0, "8bit": 25, "4bit": 27},
    "adabound": {**_ADAM, "32bit": 4, "8bit": 25, "4bit": 27},
    "lamb": {**_ADAM, "32bit": 20, "bf16": 28, "factored": 24},
    "ademamix": {**_ADAM, "bf16": 28, "8bit": 29, "fp8": 36, "4bit": 31},
    "adammini": {"32bit": 12, "bf16": 20, "8bit": 24, "fp8": 28, "4bit": 24},
    "stableadamw": {**_ADAM, "32bit": 20, "bf16": 28, "factored": 24},
    "sinkgd": dict.fromkeys(("32bit", "bf16", "8bit", "fp8", "4bit"), 16),
    "scale": dict.fromkeys(("32bit", "bf16", "8bit", "fp8", "4bit"), 12),
    "scale_head": {"32bit": 12, "bf16": 21, "8bit": 24, "fp8": 28, "4bit": 24},
    "scale_embedding": dict.fromkeys(("32bit", "bf16", "8bit", "fp8", "4bit"), 12),
    # At a rank of a sixteenth of the shorter side; of matrices over 2^20 elements half as much, about.
    "apollo": dict.fromkeys(("32bit", "bf16", "8bit", "fp8", "4bit"), 16),
    "apollomini": dict.fromkeys(("32bit", "bf16", "8bit", "fp8", "4bit"), 16),
    "prodigy": {"32bit": 12, "bf16": 41, "8bit": 44, "fp8": 48, "4bit": 44, "factored": 16},
}
#: Rules without a kernel on a card: there they take the plain path.
NO_TRITON = ("sinkgd", "prodigy", "scale", "scale_head", "scale_embedding", "apollo", "apollomini")
#: What the kernels allocate: tables of each tensor, and for each program that a step launches its tensor and place
#: (8 bytes; a program takes 8192 elements or, with many, so many more that there are at most 2^17), once for the step
#: and once for the look at the gradients; for rules with sums 16 bytes of each program; for factored moments sums of
#: the rows and columns of bands of 256 by 512 elements, at most 32 MiB at a time.
TABLES, PROGRAM, PROGRAMS, WORKSPACE = 4096, 8192, 2**17, 32 * 2**20
#: The parameter and its gradient in fp32, where they are not.
COPIES = 8
#: The same while a master is read or written, copies included: the rule's own temporaries are not there then.
MASTER = {"none": 0, "fp32": 13, "kahan": 19, "stochastic": 29, "split": 29, "split16": 29}


def state_nbytes(
    model: Model, spec: OptimSpec, world_size: int, weights: str | None = None
) -> dict[tuple[str, str], int]:
    """(moment, tier) -> bytes of :func:`memopt.price` on the fullest rank, for parameters of the dtype ``weights``
    (None: the model's own). What a master keeps stands under its key: ``master``, ``compensation``, ``correction``.

    State depends on a parameter's shape and dtype and, through overrides, on its name. So without overrides one
    parameter of each shape is priced and its lines count as often as the shape occurs: the same sum, in a hundredth of
    the time.
    """
    from memopt.core.ledger import TensorSpec

    by_name = bool(spec.overrides) or spec.is_mixed
    count: dict[str, int] = {}
    first: dict[tuple[object, ...], str] = {}
    chosen: list[tuple[str, TensorSpec]] = []
    for name, local in model.shapes:
        if name not in model.frozen:
            dtype, shape = weight_dtype(model, name, weights), model.uncut.get(name, local)
            key = (dtype, shape, model.cuts.get(name))
            one = name if by_name else first.setdefault(key, name)
            count[one] = count.get(one, 0) + 1
            if one == name:
                chosen.append((name, TensorSpec(dtype, shape)))
    ranks = candidate_ranks(world_size) if spec.partition == "zero1" else [0]  # of the others the first is the fullest
    found = (_priced(chosen, count, spec, world_size, rank, model) for rank in ranks)
    return max(found, key=lambda totals: sum(totals.values()))


def weight_dtype(model: Model, name: str, weights: str | None) -> str:
    """The dtype of a parameter. One that is given is that of the model's own weights: adapters keep theirs."""
    own = model.dtypes.get(name, "bfloat16")
    return weights if weights and own not in NF4 and ".lora_" not in name else own


def candidate_ranks(world_size: int) -> list[int]:
    """Ranks among which the fullest under ``zero1`` is looked for: all, or of many the first and an even selection
    (they differ by at most one row of each parameter).

    >>> candidate_ranks(3), len(candidate_ranks(1000)), candidate_ranks(1000)[-1]
    ([0, 1, 2], 33, 999)
    """
    n = min(world_size, _MAX_RANKS_PRICED)
    return sorted({0, *(world_size * (i + 1) // n - 1 for i in range(n))})


def _priced(
    chosen: list[tuple[str, TensorSpec]],
    count: dict[str, int],
    spec: OptimSpec,
    world_size: int,
    rank: int,
    model: Model,
) -> dict[tuple[str, str], int]:
    from memopt.pricing.price import price

    totals: dict[tuple[str, str], int] = {}
    tp, ep = model.degrees
    priced = price(chosen, spec, world_size=world_size, rank=rank, device=DEVICE, tp=tp, ep=ep)
    lines = [n for n in priced if n.lifetime != "workspace"]
    for line in [*lines, *_workspace(chosen, count, spec, world_size, rank, model)]:
        key = (line.moment, tier(line))
        times = count[line.parameter] if line.lifetime == "persistent" else 1
        totals[key] = totals.get(key, 0) + line.nbytes * times
    return totals


def _workspace(
    chosen: list[tuple[str, TensorSpec]],
    count: dict[str, int],
    spec: OptimSpec,
    world_size: int,
    rank: int,
    model: Model,
) -> list[Line]:
    """What placements allocate besides the state: it depends on all parameters together."""
    from memopt.partitions import PARTITIONS
    from memopt.pricing.price import workspace_lines

    partition, (tp, ep) = PARTITIONS[spec.partition], model.degrees
    cut = {}
    if tp * ep > 1:
        from memopt.layout.model_parallel import cut_rows

        cut = cut_rows(partition, {name: t.shape for name, t in chosen}, rank, world_size, tp, ep)
    owned = []
    for name, t in chosen:
        rows = cut[name] if name in cut else partition.rows(t.shape, rank, world_size)
        owned += [(name, rows, t.dtype)] * count[name]
    shapes = {name: tensor.shape for name, tensor in chosen}
    plain = None if spec.is_mixed else spec.hyper_for("", ())
    return workspace_lines(
        spec, lambda name: spec.hyper_for(name, shapes[name]) if plain is None else plain, owned, DEVICE
    )


def tier(line: Line) -> str:
    """The tier of a ledger line, from its location."""
    if line.location == DEVICE:
        return GPU
    if line.location.startswith("paged:"):
        return PAGEABLE
    return HOST if line.location == "cpu" else line.location.partition(":")[0]


def _leased(spec: OptimSpec, name: str, rows: Rows, dtype: str) -> int:
    """Elements of a parameter that are stepped at once where its state is streamed."""
    from memopt.layout.chunks import chunk_rows, target_of
    from memopt.layout.param import resolve_layout
    from memopt.placements import workspaces as w
    from memopt.placements.stores.by_placement import chunked
    from memopt.spec.placement_options import of_placement

    placement = spec.for_parameter(name)[1]
    most, target = {"host": (w.HOST_MOST, w.HOST_TARGET), "disk": (w.DISK_MOST, w.DISK_TARGET)}[placement]
    workspace = of_placement(spec.options, placement)["workspace"]
    step = chunk_rows(
        *chunked(resolve_layout(spec, spec.hyper_for(name, rows.shape), name, 0, rows, dtype))[:3],
        target_of(workspace, target, most),
    )
    return rows.numel if step is None else min(step, rows.count) * rows.cols


def temporaries(model: Model, spec: OptimSpec, world_size: int, weights: str | None) -> int | None:
    """What a step on a GPU allocates: tables of the kernels, what the plain path needs where rules need sums over
    ranks, and what looking at gradients of ``@cpu`` takes. None where that was never measured (another engine or rule).
    """
    if spec.engine != "native" or spec.master not in MASTER or not PLAIN_PATH.keys() >= set(spec.rule_names):
        return None
    from memopt.core.registry import by_sign
    from memopt.engines.row_chunks import PIECE
    from memopt.partitions import PARTITIONS
    from memopt.partitions.base import NUMEL_TOGETHER
    from memopt.placements.workspaces import looking
    from memopt.rules import RULES
    from memopt.spec.placement_options import of_placement

    rows = PARTITIONS[spec.partition].rows
    shared = world_size > 1 and spec.partition != "none"
    sums = rows_have_means = False
    most = total = tensors = in_kernels = looked = 0
    known: dict[tuple[str, str, str, str, Shape], int] = {}  # elements that are stepped at once
    for name, shape in model.shapes:
        if name not in model.frozen:
            rule, placement = spec.rule_for(name, shape), spec.for_parameter(name)[1]
            fmt = spec.format_for(name, rule)
            whole = "factored" in by_sign(fmt) or not RULES[rule].element_wise
            if placement == "cpu":  # the step is the host's
                if world_size == 1:
                    looked = max(looked, looking(prod(shape), of_placement(spec.options, "cpu")))
                continue
            dtype = weight_dtype(model, name, weights)
            key = (rule, fmt, placement, dtype, shape)
            if key not in known:
                known[key] = max(rows(shape, r, world_size).numel for r in (0, world_size - 1))
                if placement in ("host", "disk"):
                    known[key] = min(known[key], _leased(spec, name, rows(shape, 0, world_size), dtype))
            owned = known[key]
            total += owned
            costs = [PLAIN_PATH[rule].get(one) for one in by_sign(fmt)]
            if None in costs:
                return None
            each = max(cost for cost in costs if cost is not None)  # moments are coded one after the other
            low = dtype != "float32"
            together = shared and whole
            if not together and rule not in NO_TRITON:
                tensors, in_kernels = tensors + 1, in_kernels + owned
                sums, rows_have_means = sums or whole, rows_have_means or rule == "adammini"
                continue
            if low:
                each = max(each + COPIES, MASTER[spec.master])
            if not whole:
                owned = min(owned, PIECE)
            # Updates that need sums over ranks are under way together, up to so many elements.
            most = max(most, max(owned, min(total, NUMEL_TOGETHER) if together else 0) * each)
    return most + max(looked, kernel_tables(tensors, in_kernels, sums, rows_have_means))


def kernel_tables(tensors: int, numel: int, whole: bool, rows: bool = False) -> int:
    """Bytes that the Triton kernels allocate for so many tensors and elements; ``whole``: for a rule with sums;
    ``rows``: with a mean of each row.

    >>> kernel_tables(146, 1_235_814_400, False) / 2**20 < 4
    True
    """
    programs = min(numel // PROGRAM, PROGRAMS) + tensors
    sums = programs * 16 + min(numel * (4 / 256 + 4 / 512), WORKSPACE) if whole else 0
    return tensors * TABLES + programs * (24 if rows else 16) + int(sums)
