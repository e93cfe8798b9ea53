"""The cached step of state that is brought to it in chunks: descriptors of what stands in the buffers.

Every chunk has a buffer that is always the same, so what is there can be described once. A parameter may be cut into
rows that are in several chunks; then the kernels do not count its steps, which is done here.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from memopt.kernels import abi, pack
from memopt.kernels.cached_entries import CachedParam, record
from memopt.kernels.cached_step import CpuCachedStep
from memopt.kernels.loader import library

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.kernels.context import StepContext, Stores, Streaming
    from memopt.layout.param_step import Work
    from memopt.rules import Rule


class RowDescriptor(NamedTuple):
    """A descriptor: of which record, and how many bytes after the beginning of its gradient its rows begin."""

    owner: int
    offset: int


class StreamedPlan(CpuCachedStep):
    """``rows`` say of what each descriptor is, ``ranges`` which of them are stepped in each chunk; those before the
    first range lie where they are stepped."""

    def __init__(
        self,
        context: StepContext,
        records: Sequence[CachedParam],
        tensors: ctypes.Array[abi.TensorStep],
        rows: Sequence[RowDescriptor],
        ranges: Sequence[tuple[int, int]],
        streaming: Streaming,
        works: Mapping[int, Work],
    ) -> None:
        super().__init__(context, records, tensors)
        self._looks_first = True  # chunks are written back one after the other
        self.rows, self.ranges, self.streaming, self.works = rows, ranges, streaming, works
        cut = {row.owner for i, row in enumerate(rows) if not tensors[i].counter}
        self._cut = [(k, [i for i, row in enumerate(rows) if row.owner == k]) for k in sorted(cut)]

    def refresh(self, context: StepContext) -> bool:
        return super().refresh(context) and self.streaming.same()

    def _take(self, addresses: list[int]) -> None:
        for tensor, (owner, offset) in zip(self.tensors, self.rows, strict=True):
            tensor.g = addresses[owner] + offset

    def _set_idle(self, places: Sequence[int], idle: bool) -> None:
        found = set(places)
        for tensor, row in zip(self.tensors, self.rows, strict=True):
            if row.owner in found:
                tensor.idle = idle

    def step(self, scales: Sequence[float]) -> list[str]:
        start = time.perf_counter()
        for group, scale in zip(self.hyper, scales, strict=True):
            group.gradient_scale = scale
        counted = []
        for k, places in self._cut:
            if not self.spans[k].idle:
                counted.append(self.records[k].state["step"])
                for i in places:
                    self.tensors[i].step = int(counted[-1]) + 1
        wanted = set(range(len(self.ranges)))
        if self._missing:
            wanted = {
                i for i, bounds in enumerate(self.ranges) if not all(self.tensors[k].idle for k in range(*bounds))
            }
        with self.integrity.changing("a step"):
            if self.ranges[0][0]:
                self._step(0, self.ranges[0][0])
            self.streaming.run(self._step_chunk, wanted)
            if self.streaming.moves:
                self.follow_state()
            if counted:
                torch._foreach_add_(counted, 1)
        self.pages.after(time.perf_counter() - start)
        return []

    def reported(self) -> list[tuple[Rule, Tensor, list[float]]]:
        if not self._reporting:
            return []
        both = zip(self.rows, self.tensors, strict=True)
        some = set(self._reporting)
        return [self._report_of(row.owner, t) for row, t in both if row.owner in some and not t.idle]

    def _step_chunk(self, i: int) -> None:
        self._step(*self.ranges[i])


def make(
    context: StepContext,
    works: Sequence[Work],
    originals: Mapping[int, Tensor],
    stores: Stores,
    before: object,
) -> StreamedPlan | None:
    """A plan for these parameters, after they have stepped, and for those that ``before`` knew; None where not all of
    them can go this way."""
    if library() is None or not works or context.spec.engine != "native" or context.partition.world_size > 1:
        return None
    if context.spec.options.get("offload_gradients") is True or not stores.streams_alike:
        return None
    entries: dict[int, tuple[CachedParam, Work]] = {}
    if isinstance(before, StreamedPlan):
        entries = {one.layout.index: (one, before.works[one.layout.index]) for one in before.still_valid(context)}
    for work in works:
        p = originals[work.index]
        one = record(context, work, p)
        if one is None or pack.refuse(work.layout, work.p, work.g) or work.groups:
            return None
        if not (work.p.is_contiguous() and work.g.is_contiguous() and work.state["step"].is_cpu):
            return None
        # The gradient is another in every step, and nobody keeps this one.
        entries[work.index] = one, work._replace(g=work.p, scale=1.0)
    order = sorted(entries)
    numbers = {id(group): i for i, group in enumerate(context.groups)}
    place = {index: k for k, index in enumerate(order)}
    all_works = [entries[index][1] for index in order]
    there = [work for work in all_works if stores.in_place(work.name, work.p.device)]
    brought = [work for work in all_works if not stores.in_place(work.name, work.p.device)]
    streaming = stores.streaming(brought) if brought else None
    if streaming is None:
        return None
    lists = [there, *streaming.chunks]
    pieces = [work for chunk in lists for work in chunk]
    counts: dict[int, int] = {}
    for work in pieces:
        counts[work.index] = counts.get(work.index, 0) + 1
    tensors = (abi.TensorStep * len(pieces))()
    rows: list[RowDescriptor] = []
    for target, work in zip(tensors, pieces, strict=True):
        one, whole = entries[work.index]
        pack.describe_tensor(target, work, numbers[id(work.h)])
        _, dtype, *_ = one.like
        target.g_dtype = pack.DTYPES[dtype]
        if counts[work.index] == 1:
            target.counter = one.state["step"].data_ptr()
        elements = (work.p.data_ptr() - whole.p.data_ptr()) // whole.p.element_size() if work.p.numel() else 0
        rows.append(RowDescriptor(place[work.index], one.offset + elements * dtype.itemsize))
    ends = [0]
    for chunk in lists:
        ends.append(ends[-1] + len(chunk))
    ranges = list(pairwise(ends[1:]))
    of_index = {index: work for index, (_, work) in entries.items()}
    return StreamedPlan(context, [entries[i][0] for i in order], tensors, rows, ranges, streaming, of_index)
