"""The order in which chunks are fetched, stepped and stored, whatever executes it.

Each chunk is a chain of operations, each on a *stream*: ``read`` and ``write`` are the disk's, ``up`` and ``down`` the
device transfer between host and card, ``step`` the processor's. A stream executes what it is given in order; streams
run beside each other. A chunk lives in one of ``count`` buffers, so its chain begins when the chain that had the buffer
before has ended. That is all: with two buffers the next chunk is fetched while this one is stepped and the last one
stored.

    read   0 1 2 3 ...
    step     0 1 2 ...
    write      0 1 ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

#: What a stream returns for an operation it was given: ``result()`` waits, and raises what the operation raised;
#: ``done()`` says whether it has happened.
Event = Any


class Operation(NamedTuple):
    """``run(buffer)`` on a stream. ``nbytes`` is what it moves, for those who simulate or trace."""

    stream: str
    run: Callable[[int], None]
    nbytes: int = 0


class Streams(Protocol):
    """What executes operations: threads, streams of a card, a simulated clock."""

    def submit(self, stream: str, run: Callable[[], None], after: Sequence[Event], nbytes: int) -> Event:
        """Execute ``run`` on ``stream`` when the events have happened. Returns at once where the stream waits itself;
        raises what an operation it waited for raised."""

    def synchronize(self) -> None:
        """Wait for everything; raise the first error there was."""


def run_chains(chains: Sequence[Sequence[Operation]], streams: Streams, count: int) -> None:
    """Execute the chains in ``count`` buffers. When it returns everything has been executed; when it raises, nothing is
    under way any more."""
    ends: list[Event] = []
    begun: list[list[Event]] = []

    def begin(i: int) -> None:
        """Fetching, the first operation, needs nothing but a buffer."""
        first = chains[i][0]
        after = [ends[i - count]] if i >= count else []
        begun.append([_submit(streams, first, i % count, after)])

    try:
        for i, chain in enumerate(chains):
            while len(begun) < min(len(chains), i + count):
                begin(len(begun))
            event = begun[i][0]
            for operation in chain[1:]:
                event = _submit(streams, operation, i % count, [event])
            ends.append(event)
    finally:
        streams.synchronize()


def run_chains_on_host(chains: Sequence[Sequence[Operation]], streams: Streams, count: int) -> None:
    """:func:`run_chains` where all operations are the host's own: the only chain is executed here, since nothing could
    run beside it, and handing it to other threads takes time."""
    if len(chains) > 1:
        run_chains(chains, streams, count)
    for operation in chains[0] if len(chains) == 1 else ():
        operation.run(0)


def _submit(streams: Streams, operation: Operation, buffer: int, after: Sequence[Event]) -> Event:
    return streams.submit(operation.stream, lambda: operation.run(buffer), after, operation.nbytes)
