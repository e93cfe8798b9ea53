"""A row of bytes, and the peak of rows over the phases of a training step."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string, which
# takes a millisecond per class, and the calculator has to answer at once.

from collections.abc import Sequence
from typing import NamedTuple

#: The phases of a training step, in order. State is allocated in the first step and held from then on: every pass but
#: the first meets it.
PHASES = ("load", "forward", "loss", "backward", "step")

GPU, PAGEABLE, HOST, PINNED, DISK = "GPU", "pageable", "host", "pinned", "disk"


#: Rows of ``runtime``, by their detail: what torch allocates, what its allocator reserves beyond what is allocated, and
#: what the driver and NCCL take beside it.
WORKSPACES = "cuBLAS workspaces"
ROUNDING = "blocks larger than what is asked for"
RESERVED = "allocator: what is reserved beside it"
CONTEXT, NCCL = "CUDA context", "NCCL, one communicator"
#: The three figures, from the least on -> details of ``runtime`` that it contains; the other rows are in all three.
FIGURES = {
    "allocated": (WORKSPACES, ROUNDING),
    "reserved": (WORKSPACES, ROUNDING, RESERVED),
    "process": (WORKSPACES, ROUNDING, RESERVED, CONTEXT, NCCL),
}


class Row(NamedTuple):
    """Bytes of one kind on one rank.

    ``what`` is ``weights``, ``buffers``, ``gradients``, ``state``, ``activations``, ``temporaries`` or ``runtime``;
    ``detail`` the dtype, the moment or a few words. ``tier`` is ``GPU``, ``pageable`` (GPU memory that moves to the
    host under pressure), ``host``, ``pinned`` (host memory that cannot be paged out) or ``disk``. ``phases`` are those
    in which the bytes are held. ``provenance`` is ``exact`` (known byte by byte), ``formula``, ``measured constant`` or
    ``assumed`` (shapes were made up for a bare count). ``low`` and ``high`` bound ``nbytes`` where it is not certain.
    """

    spec: str
    what: str
    detail: str
    nbytes: int
    tier: str
    phases: tuple[str, ...]
    provenance: str
    low: int | None = None
    high: int | None = None

    def bounded(self, which: str) -> int:
        """``low``, ``nbytes`` (``expected``) or ``high``."""
        value = {"low": self.low, "expected": None, "high": self.high}[which]
        return self.nbytes if value is None else value


class Bounds(NamedTuple):
    """Bytes: at least, expected, at most."""

    low: int
    expected: int
    high: int


class Peak(NamedTuple):
    """The phase that needs most: ``nbytes`` of GPU memory that cannot move, ``pageable`` bytes that can, and bytes on
    the host, pinned ones included."""

    spec: str
    phase: str
    nbytes: int
    pageable: int
    host: int


def peak(spec: str, rows: Sequence[Row], which: str = "expected") -> Peak:
    """The maximum over phases of what is held at once, never a sum of maxima; of equal phases the last."""
    totals = []
    for order, phase in enumerate(PHASES):
        held = {GPU: 0, PAGEABLE: 0, HOST: 0}
        for row in rows:
            if phase in row.phases and row.tier != DISK:
                held[row.tier if row.tier in (GPU, PAGEABLE) else HOST] += row.bounded(which)
        totals.append((held[GPU] + held[PAGEABLE], order, Peak(spec, phase, held[GPU], held[PAGEABLE], held[HOST])))
    return max(totals)[2]


def figure(rows: Sequence[Row], name: str) -> Bounds:
    """``allocated`` (torch.cuda.max_memory_allocated), ``reserved`` (max_memory_reserved) or ``process`` (what
    nvidia-smi shows): the peak of the rows that it contains, at each of their bounds."""
    chosen = [r for r in rows if r.what != "runtime" or r.detail in FIGURES[name]]
    return Bounds(*(peak("", chosen, which).nbytes for which in ("low", "expected", "high")))
