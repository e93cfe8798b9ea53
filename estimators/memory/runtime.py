"""What a process takes beside what torch has allocated: workspaces, what the allocator reserves, the CUDA context."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from estimators.allocator.contexts import CONTEXTS, context, workspace
from estimators.hardware import generation
from estimators.memory.memory_row import CONTEXT, GPU, NCCL, PHASES, RESERVED, ROUNDING, WORKSPACES, Row, peak
from estimators.models.model import Model
from estimators.parallel.degrees import communicators
from estimators.training import Training

if TYPE_CHECKING:
    from estimators.activations import Activations
    from memopt.spec import OptimSpec

_MIB = 2**20
#: Threads that multiply, each with a workspace of cuBLAS: the forward pass's and autograd's.
THREADS = 2
#: By how much what is reserved may be above what the replay says: percent of all that is allocated besides weights, and
#: half of the largest tensor of a layer, since whether one more of those fits between the others hangs on bytes. The
#: percentage is the largest shortfall on the runs of benchmarks/measured/t4_lora.csv, 6.8, and MARGIN more.
MARGIN = 5.0
SPREAD = 6.8 + MARGIN
#: Without a replay: of all that is allocated besides weights, in percent.
FRAGMENTS = (0, 2, 10)
#: NCCL's buffers for one communicator: low, expected, high. Reported by others and not measured here.
BUFFERS = (300 * _MIB, 600 * _MIB, 1000 * _MIB)


#: Bytes of the card for which plans are searched, 0 elsewhere; each thread has its own.
_SEARCHED: "ContextVar[int]" = ContextVar("searched", default=0)


@contextmanager
def searched(nbytes: int) -> Iterator[None]:
    """While plans for a card of so many bytes are searched, nothing is replayed that is more than that by what is
    allocated alone: whatever is reserved beside it, it does not fit."""
    before = _SEARCHED.set(nbytes)
    try:
        yield
    finally:
        _SEARCHED.reset(before)


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
    one, known = workspace(card), context(card, training.of.loads_all_kernels)
    workspaces = Row(
        name, "runtime", WORKSPACES, THREADS * one, GPU, PHASES[1:], "formula", one, THREADS * one + 4 * _MIB
    )
    measured = "measured constant" if known is CONTEXTS.get(generation(card)) else "assumed"
    found = [
        workspaces,
        Row(name, "runtime", CONTEXT, known.expected, GPU, PHASES, measured, known.low, known.high),
    ]
    one_group = Row(name, "runtime", NCCL, BUFFERS[1], GPU, PHASES, "assumed", BUFFERS[0], BUFFERS[2])
    found += [one_group] * communicators(training, world_size)
    allocated = max(of_phase(rows, phase) for phase in PHASES)
    moving = max(of_phase(rows, phase, ("weights", "buffers")) for phase in PHASES)
    unordered = ran is None or not (ran.walked or ran.recorded or ran.flown)
    if ran is None or unordered or 0 < _SEARCHED.get() < allocated + known.low:
        least, share, most = (moving * percent // 100 for percent in FRAGMENTS)
        return [*found, Row(name, "runtime", RESERVED, share, GPU, PHASES[1:], "assumed", least, most)]
    from estimators.allocator.alloc_conf import parsed
    from estimators.allocator.overhead import overhead

    over = overhead([*rows, workspaces], model, training, ran, parsed(training.alloc_conf))
    more = int(SPREAD * moving / 100) + over.block // 2
    blocks = Row(name, "runtime", ROUNDING, over.rounding, GPU, PHASES[1:], "formula", 0, over.rounding + 8 * _MIB)
    expected, most = (peak(name, [*rows, workspaces], which).nbytes for which in ("expected", "high"))
    # What the replay leaves out is reserved too. What may be there besides lies in what is reserved and free, as far as
    # that goes.
    reserved = over.reserved + max(0, expected - over.requested)
    beside, at_most = (max(0, reserved - nbytes - over.rounding) for nbytes in (expected, most))
    return [*found, blocks, Row(name, "runtime", RESERVED, beside, GPU, PHASES[1:], "formula", 0, at_most + more)]


def of_phase(rows: Sequence[Row], phase: str, but: tuple[str, ...] = ()) -> int:
    """Bytes on the GPU in one phase."""
    return sum(r.nbytes for r in rows if r.tier == GPU and phase in r.phases and r.what not in but)
