"""Updates of many parameters at once, so that what they ask of the ranks, or of each other's company, is one thing.

An update of a whole tensor stops two or three times for a sum over the ranks that hold its other rows. One after the
other, that is hundreds of collectives of a few bytes. Here each update of a bucket runs in a thread of its own, one at
a time, until it needs a sum; when all have stopped, their sums are taken in one collective, and they go on. So a
bucket costs as many collectives as one parameter, and a rule stays the plain function that it is. In the same way
rules of matrices stop for their whole matrices, which are put together, multiplied in batches and cut again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt.partitions.base import MATRICES_TOGETHER, NUMEL_TOGETHER, sum_over
from memopt.partitions.world import ProcessGroups

#: Updates under way at once.
WIDTH = 64

Total = Callable[[Tensor], Tensor]
#: ``solve(asked)``: of every update that has stopped for its matrix, what belongs in its place.
Solve = Callable[[Sequence[tuple[Any, Tensor]]], Sequence[Tensor]]


class ParamUpdate(NamedTuple):
    """One parameter's update, which calls its first argument for every sum over ``groups``, and its second one for its
    whole matrix, of which ``solve`` is told as ``who``. ``numel`` must be the same on all ranks, for it decides which
    updates share a bucket, as must ``whole``, the elements of a matrix that one of the ranks is to work on."""

    run: Callable[[Total, Total], None]
    groups: ProcessGroups
    numel: int
    device: torch.device
    who: Any = None
    whole: int = 0


def run_together(
    updates: Sequence[ParamUpdate], solve: Solve, at_once: Callable[[Sequence[Any]], bool] = lambda whos: False
) -> None:
    """Run all updates. Every rank must call this with the same parameters in the same order. ``at_once(whos)`` may take
    a bucket over: it is then to ask the ranks for what ``solve`` would, once, and returns True."""
    for bucket in _buckets(updates):
        if at_once([update.who for update in bucket]):
            continue
        pending = [_Pending(update) for update in bucket]
        try:
            going = pending
            while going:
                for one in going:
                    one.go_on()
                going = [one for one in going if one.partial is not None or one.matrix is not None]
                _sum([one for one in going if one.partial is not None])
                _solve([one for one in going if one.matrix is not None], solve)
        finally:
            for one in pending:
                one.stop()


def _buckets(updates: Sequence[ParamUpdate]) -> Iterator[list[ParamUpdate]]:
    bucket: list[ParamUpdate] = []
    for update in updates:
        room = max(NUMEL_TOGETHER, *(MATRICES_TOGETHER * u.whole for u in [*bucket, update]))
        if bucket and (len(bucket) == WIDTH or sum(u.numel for u in bucket) + update.numel > room):
            yield bucket
            bucket = []
        bucket.append(update)
    if bucket:
        yield bucket


def _sum(pending: Sequence[_Pending]) -> None:
    """One collective for each process group and dtype; every lane gets its part of the sum."""
    alike: dict[tuple[ProcessGroups, torch.dtype, torch.device], list[_Pending]] = {}
    for one in pending:
        assert one.partial is not None
        alike.setdefault((one.update.groups, one.partial.dtype, one.partial.device), []).append(one)
    for (groups, _, _), members in alike.items():
        partials = [one.partial for one in members if one.partial is not None]
        total = sum_over(torch.cat([x.reshape(-1) for x in partials]), groups)
        parts = total.split([x.numel() for x in partials])
        for one, x, part in zip(members, partials, parts, strict=True):
            one.partial, one.sum = None, part.view(x.shape)


def _solve(pending: Sequence[_Pending], solve: Solve) -> None:
    if pending:
        asked = [(one.update.who, one.matrix) for one in pending if one.matrix is not None]
        for one in pending:
            one.matrix = None
        for one, answer in zip(pending, solve(asked), strict=True):
            one.answer = answer


class _Stopped(BaseException):
    """Another update of the bucket failed."""


class _Pending:
    """One update, in a thread that runs only while the caller waits for it."""

    def __init__(self, update: ParamUpdate) -> None:
        self.update = update
        self.partial: Tensor | None = None
        self.sum: Tensor | None = None
        self.matrix: Tensor | None = None
        self.answer: Tensor | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self._mine, self._callers = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, args=(_stream(update.device),), daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Run the update until it needs a sum or ends; raises what it raises."""
        self._mine.release()
        self._callers.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        if self._thread.is_alive():
            self._stopping = True
            self._mine.release()
            self._thread.join()

    def _main(self, stream: AbstractContextManager[object]) -> None:
        self._mine.acquire()
        try:
            if not self._stopping:
                with torch.no_grad(), stream:  # both are a thread's own
                    self.update.run(self._total, self._whole)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._callers.release()

    def _total(self, x: Tensor) -> Tensor:
        if not self.update.groups:
            return x
        self.partial = x
        self._stop_for_answer()
        assert self.sum is not None
        return self.sum

    def _whole(self, x: Tensor) -> Tensor:
        self.matrix = x
        del x
        self._stop_for_answer()
        answer, self.answer = self.answer, None
        assert answer is not None
        return answer

    def _stop_for_answer(self) -> None:
        self._callers.release()
        self._mine.acquire()
        if self._stopping:
            raise _Stopped


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """The caller's stream on this device."""
    return torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else nullcontext()
