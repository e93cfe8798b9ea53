"""What a process takes beside what torch has allocated: workspaces, what the allocator reserves, the CUDA context."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from typing import TYPE_CHECKING

from estimators.model import Model
from estimators.rows import CONTEXT, GPU, NCCL, PHASES, RESERVED, WORKSPACES, Row
from estimators.training import Training

if TYPE_CHECKING:
    from estimators.activations import Activations
    from memopt.spec import OptimSpec

_MIB = 2**20
#: Driver context with the kernels of torch and cuBLAS loaded: low, expected, high. Reported by others and not measured
#: here, so such rows are ``assumed``.
CONTEXTS = (300 * _MIB, 400 * _MIB, 900 * _MIB)
#: cuBLAS's workspace, which torch allocates for each thread that multiplies: the forward pass's and autograd's
#: (ATen/cuda/CublasHandlePool.cpp: 2 x 4096 and 8 x 16 KiB before Hopper, 32 MiB on it).
CUBLAS, THREADS = 2 * 4096 * 1024 + 8 * 16 * 1024, 2
#: What the caching allocator holds beyond what is asked of it, in percent of all that is allocated besides weights:
#: blocks of 512 bytes and segments of 2 MiB cost little, fragments of changing sizes more.
FRAGMENTS = (0, 2, 10)
#: NCCL's buffers for one communicator: low, expected, high. Reported by others and not measured here.
BUFFERS = (300 * _MIB, 600 * _MIB, 1000 * _MIB)


def runtime(
    rows: list[Row],
    model: Model,
    spec: "OptimSpec",
    training: Training,
    ran: "Activations | None",
    world_size: int = 1,
    card: str = "",
) -> list[Row]:
    """``rows`` are all others; ``card`` is the name of the card, or a size or empty where only that is known."""
    name = str(spec)
    low, expected, high = CONTEXTS
    moving: dict[str, int] = {}
    for row in rows:
        if row.tier == GPU and row.what not in ("weights", "buffers"):
            for phase in row.phases:
                moving[phase] = moving.get(phase, 0) + row.nbytes
    most = max(moving.values(), default=0)
    least, share, largest = (most * percent // 100 for percent in FRAGMENTS)
    cublas = THREADS * CUBLAS
    nccl = Row(name, "runtime", NCCL, BUFFERS[1], GPU, PHASES, "assumed", BUFFERS[0], BUFFERS[2])
    return [
        Row(name, "runtime", WORKSPACES, cublas, GPU, PHASES[1:], "formula", 0, cublas * 4),
        Row(name, "runtime", CONTEXT, expected, GPU, PHASES, "assumed", low, high),
        *([nccl] if world_size > 1 else []),
        Row(name, "runtime", RESERVED, share, GPU, PHASES[1:], "assumed", least, largest),
    ]
