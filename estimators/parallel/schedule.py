"""The passes of one rank of a pipeline, in their order: which micro-batches are in flight at each.

Source: torch/distributed/pipelining/schedules.py of torch 2.13 (Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B,
whose warm-up is that of Megatron-LM's schedules.py, Narayanan et al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one of the rank's chunks."""

    forward: bool
    chunk: int


def passes(schedule: str, rank: int, stages: int, chunks: int, micro_batches: int) -> Iterator[Pass]:
    """Of ``rank`` of ``stages`` ranks with so many ``chunks`` each. More micro-batches than fill the pipeline several
    times repeat what is there.

    >>> "".join("BF"[p.forward] for p in passes("1f1b", 1, 3, 1, 4))
    'FFBFBFBB'
    """
    if schedule == "gpipe":
        yield from [Pass(True, 0)] * micro_batches
        yield from [Pass(False, 0)] * micro_batches
        return
    n = min(micro_batches, 4 * stages)
    if chunks == 1:
        warm = min(n, stages - rank)
    else:
        n -= n % stages if n > stages else 0
        warm = min((chunks - 1) * stages + 2 * (stages - 1 - rank), n * chunks)
    total, done = n * chunks, 0
    for i in range(warm):
        yield Pass(True, _chunk(i, stages, chunks))
    for i in range(warm, total):
        if chunks == 1:  # torch's loop begins with a backward pass
            yield Pass(False, 0)
            yield Pass(True, 0)
        else:
            yield Pass(True, _chunk(i, stages, chunks))
            yield Pass(False, chunks - 1 - _chunk(done, stages, chunks))
        done += 1
    for i in range(done, total):
        yield Pass(False, chunks - 1 - _chunk(i, stages, chunks))


def _chunk(i: int, stages: int, chunks: int) -> int:
    """Micro-batches go through a chunk in rounds of as many as there are stages."""
    return i // stages % chunks


def most_in_flight(schedule: str, rank: int, stages: int, chunks: int, micro_batches: int) -> int:
    """Passes of which activations are there at most, in chunks.

    >>> most_in_flight("1f1b", 0, 8, 1, 32), most_in_flight("gpipe", 0, 8, 1, 32), most_in_flight("1f1b", 7, 8, 1, 32)
    (8, 32, 1)
    >>> most_in_flight("interleaved-2", 0, 8, 2, 32)  # Megatron's 8 * (1 + 7 / (8 * 2)) micro-batches of 2 chunks
    23
    """
    flying = most = 0
    for one in passes(schedule, rank, stages, chunks, micro_batches):
        flying += 1 if one.forward else -1
        most = max(most, flying)
    return most
