"""Streams of this machine's processor and disks: threads that read and write while the calling thread steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, final


class TimedOperation(NamedTuple):
    """An operation that was executed: seconds on one clock."""

    stream: str
    begin: float
    end: float
    nbytes: int


@final
class Threads:
    """``workers`` threads for each of some streams; every other stream is the thread that calls :meth:`submit`.

    Operations of a stream with several threads begin in order and may end in another. ``trace``, a list, receives a
    :class:`TimedOperation` for each operation.
    """

    def __init__(self, workers: dict[str, int]) -> None:
        self._workers = workers
        self._pools = self._started()
        self._pending: list[Future[None]] = []
        self._failed = False
        self.trace: list[TimedOperation] | None = None

    def submit(self, stream: str, run: Callable[[], None], after: Sequence[Future[None]], nbytes: int) -> Future[None]:
        if stream in self._pools:
            event = self._pools[stream].submit(self._execute, stream, run, after, nbytes)
            self._pending.append(event)
            return event
        event = Future()
        self._execute(stream, run, after, nbytes)
        event.set_result(None)
        return event

    def _execute(self, stream: str, run: Callable[[], None], after: Sequence[Future[None]], nbytes: int) -> None:
        try:
            for event in after:
                event.result()
            if self._failed:
                raise Cancelled
            begin = time.perf_counter()
            run()
        except BaseException:
            self._failed = True  # what is queued behind must not touch the state any more
            raise
        if self.trace is not None:
            self.trace.append(TimedOperation(stream, begin, time.perf_counter(), nbytes))

    def synchronize(self) -> None:
        pending, self._pending = self._pending, []
        errors = [event.exception() for event in pending]
        self._failed = False
        for error in errors:
            if error is not None and not isinstance(error, Cancelled):
                raise error

    def _started(self) -> dict[str, ThreadPoolExecutor]:
        return {stream: ThreadPoolExecutor(n, f"memopt.{stream}") for stream, n in self._workers.items()}

    def abandon(self) -> None:
        """Wait for what is being executed, also for what an interruption left without anybody to wait for it, and
        execute nothing more of what was submitted."""
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools, self._pending, self._failed = self._started(), [], False

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=False)


class Cancelled(Exception):
    """An operation was not executed because an earlier one failed."""
