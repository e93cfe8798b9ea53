"""The rows of a training step: activations, gradients, temporaries and the runtime, by phase."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Callable
from typing import TYPE_CHECKING

from estimators.model import Model, Shape
from estimators.rows import GPU, PHASES, WORKSPACES, Row
from estimators.training import Training

if TYPE_CHECKING:
    from estimators.activations import Activations

_MIB = 2**20
#: Driver context with the kernels of torch and cuBLAS loaded, and cuBLAS's workspace (8.5 MiB before Hopper, 32 MiB on
#: it): low, expected, high. Reported by others and not measured here, so such rows are ``assumed``.
CONTEXT = (300 * _MIB, 400 * _MIB, 900 * _MIB)
#: cuBLAS's workspace, which torch allocates for each thread that multiplies: the forward pass's and autograd's
#: (ATen/cuda/CublasHandlePool.cpp: 2 x 4096 and 8 x 16 KiB before Hopper, 32 MiB on it).
CUBLAS, THREADS = 2 * 4096 * 1024 + 8 * 16 * 1024, 2
#: What the caching allocator holds beyond what is asked of it, in percent of all that is allocated besides weights:
#: blocks of 512 bytes and segments of 2 MiB cost little, fragments of changing sizes more.
FRAGMENTS = (0, 2, 10)
#: NCCL's buffers for one communicator: low, expected, high. Reported by others and not measured here.
NCCL = (300 * _MIB, 600 * _MIB, 1000 * _MIB)


def run(
    model: Model, training: Training, sharded: bool = False, outputs: bool = False
) -> "tuple[Activations | None, str]":
    """The activations of a step, or None and why they are not known. ``sharded``: FSDP2 has its own mixed precision.
    ``outputs``: whether the model's output lives until the backward pass is over."""
    if not training.seq:
        return None, "activations (say --seq)"
    if model.config is None:
        return None, "activations (only shapes are known; name an architecture or a config.json)"
    from estimators.activations import MIXED, NOT_SELECTIVE, Step, activations, written
    from estimators.activations.scope import parameters

    if not written(str(model.config.get("model_type"))):
        return None, f"activations (there is no formula for {model.config.get('model_type')} yet)"
    selective = training.checkpointing.startswith("selective")
    refused = NOT_SELECTIVE.get(str(model.config["model_type"])) if selective else None
    if refused:
        return None, f"activations (torch refuses selective checkpointing of this model: {refused})"
    autocast = bool(training.mixed) and not sharded
    if autocast and model.config.get("model_type") not in MIXED:
        return None, "activations (there is no formula for it under autocast yet)"
    computed = "bfloat16" if training.mixed and sharded else None  # FSDP2 casts what it gathers
    entries = [
        (
            name,
            shape,
            computed if computed and ".lora_" not in name else model.dtypes.get(name, "bfloat16"),
            name not in model.frozen,
        )
        for name, shape in model.shapes
    ]
    item = 4 if entries and entries[0][2] == "float32" else 2
    step = Step(
        training.batch,
        training.seq,
        training.attention,
        item,
        training.lora,
        training.device == "cpu",
        2 * autocast,
        training.lora_dropout,
        outputs,
        training.loss,
        training.float8,
    )
    try:
        return activations(model.config, model.name, step, training.checkpointing, parameters(entries)), ""
    except KeyError as error:
        return None, f"activations (there is no formula for {error.args[0]!r} yet)"


def rows(
    name: str,
    model: Model,
    training: Training,
    ran: "Activations",
    gradients: list[tuple[str, int]],
    known: str,
    few: list[Row] | None,
) -> list[Row]:
    """Activations and gradients by phase; ``few`` are the rows of gradients that do not stay."""
    forward, loss = ran.forward.activations - ran.body_copies, ran.loss.activations - ran.copies
    held = [
        Row(name, "weights", "autocast's copies", n, GPU, (phase,), "formula")
        for phase, n in (("forward", ran.body_copies), ("loss", ran.copies))
        if n
    ]
    held += [
        Row(name, "activations", "saved, and the layer at work", forward, GPU, ("forward",), "formula"),
        Row(name, "activations", "saved, and the loss", loss, GPU, ("loss",), "formula"),
    ]
    if few is not None:
        alive = ran.accumulated.activations  # the moment that has most, whatever gradients there are
        held += few
    elif training.accumulate > 1:
        alive = ran.accumulated.activations
        held += [Row(name, "gradients", kind, n, GPU, PHASES[1:], known) for kind, n in gradients]
    else:
        alive, total = ran.backward.activations, sum(n for _, n in gradients)
        made = min(ran.backward.gradients, total)
        held.append(Row(name, "gradients", "made at that moment", made, GPU, ("backward",), "formula"))
        held += [Row(name, "gradients", kind, n, GPU, ("step",), known) for kind, n in gradients]
    held.append(Row(name, "activations", "left, and at work", alive, GPU, ("backward",), "formula"))
    return held


def one_gradient(name: str, gradients: list[tuple[str, int]], known: str) -> list[Row]:
    """Gradients that are released: those that are there at a time, in the backward pass alone."""
    return [Row(name, "gradients", f"{kind}, one at a time", n, GPU, ("backward",), known) for kind, n in gradients]


def released(model: Model, here: Model, nbytes: Callable[[str, Shape], tuple[str, int]]) -> list[tuple[str, int]]:
    """The dtype and bytes of gradients that are there at a time: the largest one. ``here`` is the model with the rows
    of this rank.

    That of an embedding which is also the head's weight waits for its other half until the end of the backward pass,
    where autograd holds both halves and their sum. FSDP2 hands over the gradients of a block together.
    """
    each = [(name, *nbytes(name, shape)) for name, shape in here.shapes if name not in here.frozen]
    if not each:
        return []
    if here is not model:
        from estimators.sharding import largest_block

        return [(max(kind for _, kind, _ in each), largest_block((name, n) for name, _, n in each))]
    shared = _tied(model)
    table = max((n for name, _, n in each if name == shared), default=0)
    most = max((3 * n if name == shared else n + table, kind) for name, kind, n in each)
    return [(most[1], most[0])]


def _tied(model: Model) -> str | None:
    """The embedding that is the head's weight too: a table of the vocabulary that is there once."""
    vocabulary = (model.config or {}).get("vocab_size")
    tables = [name for name, shape in model.shapes if len(shape) == 2 and shape[0] == vocabulary]
    return tables[0] if len(tables) == 1 else None


def runtime(name: str, rows_: list[Row], world_size: int = 1) -> list[Row]:
    """The CUDA context, NCCL's buffers where there are several ranks, and the allocator's share of what comes and
    goes."""
    low, expected, high = CONTEXT
    moving: dict[str, int] = {}
    for row in rows_:
        if row.tier == GPU and row.what not in ("weights", "buffers"):
            for phase in row.phases:
                moving[phase] = moving.get(phase, 0) + row.nbytes
    most = max(moving.values(), default=0)
    least, share, largest = (most * percent // 100 for percent in FRAGMENTS)
    nccl = Row(name, "runtime", "NCCL, one communicator", NCCL[1], GPU, PHASES, "assumed", NCCL[0], NCCL[2])
    cublas = THREADS * CUBLAS
    return [
        Row(name, "runtime", WORKSPACES, cublas, GPU, PHASES[1:], "formula", 0, cublas * 4),
        Row(name, "runtime", "CUDA context, cuBLAS", expected, GPU, PHASES, "assumed", low, high),
        *([nccl] if world_size > 1 else []),
        Row(name, "runtime", "allocator: rounding, fragments", share, GPU, PHASES[1:], "assumed", least, largest),
    ]
