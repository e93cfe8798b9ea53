"""A whole optimizer's step on the CPU, prepared once and repeated while nothing but the gradients changes.

If anything else does, the step goes the long way, and a new plan is made.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from memopt.core.rows import Rows
from memopt.kernels import abi, pack
from memopt.kernels.cached_entries import CachedEntries, CachedParam, record
from memopt.kernels.huge_pages import SMALLEST, Pages
from memopt.kernels.loader import library
from memopt.partitions.batched_allreduce import ParamUpdate, run_together
from memopt.partitions.world import ProcessGroups

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.kernels.context import StepContext, StepOutcome, Stores
    from memopt.layout.param_step import Work
    from memopt.rules import Rule

_SIZE = ctypes.sizeof(abi.TensorStep)
CPU = torch.device("cpu")


class Shared(NamedTuple):
    """A parameter whose rows are on several ranks, which add up what its rule asks for: ``numel`` elements on each, the
    same number on all of them."""

    tensor: abi.TensorStep
    groups: ProcessGroups
    numel: int


NONE_SHARED: Mapping[int, Shared] = MappingProxyType({})


class CpuCachedStep(CachedEntries):
    """The descriptors of all parameters that have had a gradient; made by :func:`make`."""

    #: The host knows what gradients are multiplied by when it steps.
    on_device = False
    norm: Tensor | None = None

    def __init__(
        self,
        context: StepContext,
        records: Sequence[CachedParam],
        tensors: ctypes.Array[abi.TensorStep],
        shared: Mapping[int, Shared] = NONE_SHARED,
    ) -> None:
        super().__init__(context, records)
        self.tensors = tensors
        #: By place, those whose steps take sums over ranks: each has a call of its own, and is idle among the others.
        self.shared = shared
        for i in shared:
            tensors[i].idle = True
        self.integrity = context.integrity
        self.spans = (abi.GradientSpan * len(records))()
        for span, one in zip(self.spans, records, strict=True):
            # Of a parameter that is whole on every rank all of the gradient is looked at: ranks must see the same.
            _, dtype, _, shape, _ = one.like
            span.numel, span.dtype = shape.numel(), pack.DTYPES[dtype]
        self.hyper = (abi.Group * len(self.groups))()
        self._offsets = [one.offset for one in records]
        self._shifted = any(self._offsets)
        self._reporting = [i for i, one in enumerate(records) if one.layout.rule.reports]
        self._missing: list[int] = []  # places of those without a gradient
        self._unseen = False  # nobody has looked at the gradients of this step
        # Ranks agree on what is finite before anything is stepped.
        self._looks_first = self.partition.world_size > 1 or not any(map(_several_passes, records, tensors))
        # What looks at the gradients refers to their descriptors and not to the plan: memory is freed with the last
        # reference to the optimizer, without waiting for the garbage collector.
        spans = self.spans
        memory = self.lasting[: len(records)]
        large = [(i, p.nbytes) for i, p in enumerate(memory) if p.nbytes >= SMALLEST]
        self.pages = Pages(
            [(x.data_ptr(), x.nbytes) for x in self.lasting],
            lambda: [(spans[i].data or 0, nbytes) for i, nbytes in large],
        )

    def check_recording(self) -> None:
        """No graph records what runs on the host."""

    def refresh(self, context: StepContext) -> bool:
        """Take this step's gradients and hyperparameters; False if anything else is not as it was."""
        self._unseen = False
        if not self.same(context):
            return False
        for i, group in enumerate(self.groups):
            self.hyper[i] = pack.describe_group(self.rules[i], group)
        addresses = self.gradients(context)
        if addresses is None:
            return False
        if self._missing or len(self.parameters) < len(self.cached):
            self._leave_out([i for i, address in enumerate(addresses) if address < 0])
        for span, address in zip(self.spans, addresses, strict=True):
            span.data = address
        self._take(addresses)
        return True

    def _take(self, addresses: list[int]) -> None:
        """These are the gradients of this step."""
        if self._shifted:
            addresses = list(map(int.__add__, addresses, self._offsets))
        for tensor, address in zip(self.tensors, addresses, strict=True):
            tensor.g = address
        for i, one in self.shared.items():
            one.tensor.g = self.tensors[i].g

    def _set_idle(self, places: Sequence[int], idle: bool) -> None:
        for i in places:
            self.tensors[i].idle = idle or i in self.shared

    def _leave_out(self, missing: list[int]) -> None:
        """Only these have no gradient."""
        if missing != self._missing:
            for places, idle in ((self._missing, False), (missing, True)):
                self._set_idle(places, idle)
                for i in places:
                    self.spans[i].idle = idle
            self._missing = missing

    def look(self, summed: bool) -> tuple[list[str], list[float]]:
        """The names of parameters whose gradient holds a NaN or an Inf, and the sum of squares of each gradient. Where
        the step takes several passes, its first one is left to say it."""
        self._unseen = not (self._looks_first or summed)
        if self._unseen:
            return [], []
        bad = look(self.spans, summed)
        sums = [span.squares for span in self.spans if not span.idle] if summed else []
        return [self.names[i] for i in bad], sums

    def step(self, scales: Sequence[float]) -> list[str]:
        """Step all parameters, with the gradients of each group multiplied by its number, and bring what other ranks
        need of them to them; the kernels count the steps. Returns names where nothing was stepped, because only now
        NaN or Inf was found."""
        start = time.perf_counter()
        for group, scale in zip(self.hyper, scales, strict=True):
            group.gradient_scale = scale
        bad: list[str] = []
        if self.partition.world_size == 1:
            bad = self._step(0, len(self.cached))
        else:
            with self.integrity.changing("a step"):
                self._step_in_buckets()
        self.pages.after(time.perf_counter() - start)
        return bad

    def _step_in_buckets(self) -> None:
        """One travels while the next is stepped. A bucket ends behind its last parameter that has a gradient."""
        partition, parameters = self.partition, self.parameters
        missing = set(self._missing)
        places = [i for i in range(len(self.cached)) if i not in missing]
        for first, stop in partition.buckets(parameters):
            self._step(places[first], places[stop - 1] + 1)  # ranks have looked at the gradients before
            self._step_together([self.shared[i] for i in places[first:stop] if i in self.shared])
            partition.all_gather_begin(parameters[first:stop])
        partition.all_gather_wait()

    def _step_together(self, some: Sequence[Shared]) -> None:
        """Step these with sums over the ranks that share them."""
        if some:
            updates = [ParamUpdate(partial(self._step_shared, one), one.groups, one.numel, CPU) for one in some]
            run_together(updates, lambda asked: [x for _, x in asked])  # none of them asks for a whole matrix

    def _step_shared(self, one: Shared, total: Callable[[Tensor], Tensor], _: object) -> None:
        over_ranks, failed = abi.over_ranks(total)
        self._call(ctypes.byref(one.tensor), 1, over_ranks, False)
        if failed:
            raise failed[0]

    def _call(self, tensors: Any, count: int, over_ranks: Any, unseen: bool) -> int:
        found = library()
        assert found is not None
        threads, seed = torch.get_num_threads(), self.seed & 0xFFFFFFFF
        hyper, step = ctypes.byref(self.hyper), found.handle.memopt_step
        code: int = step(hyper, tensors, count, seed, threads, found.index, over_ranks, unseen)
        if code == 1:
            raise MemoryError("the kernels could not allocate their list of tensors; nothing was changed")
        return code

    def _step(self, first: int, stop: int) -> list[str]:
        unseen, self._unseen = self._unseen, False
        code = self._call(ctypes.byref(self.tensors, first * _SIZE), stop - first, abi.ALONE, unseen)
        if code == 3:  # nothing was stepped: for a gradient, or because fp32 cannot hold the square of a finite one
            return [self.names[i] for i in look(self.spans, False)] or self._step(first, stop)
        return []

    def reported(self) -> list[tuple[Rule, Tensor, list[float]]]:
        """What parameters have reported in this step, of rules that report anything."""
        there = [i for i in self._reporting if not self.spans[i].idle]
        steps = [self.shared[i].tensor if i in self.shared else self.tensors[i] for i in there]
        return [self._report_of(i, one) for i, one in zip(there, steps, strict=True)]

    def _report_of(self, i: int, step: abi.TensorStep) -> tuple[Rule, Tensor, list[float]]:
        return self.records[i].layout.rule, self.records[i].p, list(step.reported)

    def synchronize(self) -> StepOutcome | None:
        """Nothing is left to be noted: the kernels are done when a step returns."""
        return None

    def skipped_on_device(self) -> int:
        return 0


def _several_passes(one: CachedParam, tensor: abi.TensorStep) -> bool:
    return tensor.format in abi.ALL_FACTORED or one.layout.rule.inner in abi.SEVERAL_PASSES


def look(spans: ctypes.Array[abi.GradientSpan], summed: bool) -> list[int]:
    """The places of those that hold a NaN or an Inf; with ``summed`` the sums of their squares are in the spans."""
    found = library()
    assert found is not None
    code = found.handle.memopt_look(ctypes.byref(spans), len(spans), summed, torch.get_num_threads(), found.index)
    if code == 1:
        raise MemoryError("the kernels could not allocate their list of gradients; nothing was changed")
    return [i for i, span in enumerate(spans) if span.bad] if code else []


def make(
    context: StepContext,
    works: Sequence[Work],
    originals: Mapping[int, Tensor],
    stores: Stores,
    before: object,
) -> CpuCachedStep | None:
    """A plan for these parameters, after they have stepped, and for those that ``before`` knew; None where not all of
    them can go this way."""
    if library() is None or not works or context.spec.engine != "native" or not context.partition.plannable:
        return None
    world = context.partition.world_size
    numbers = {id(group): i for i, group in enumerate(context.groups)}
    fresh: dict[int, tuple[CachedParam, Work]] = {}
    over_ranks: dict[int, tuple[ProcessGroups, int]] = {}
    for work in works:
        p, counter = originals[work.index], work.state["step"]
        one = record(context, work, p)
        if one is None or not stores.in_place(work.name, p.device) or not pack.is_dense(one.like):
            return None
        if pack.refuse(work.layout, work.p, work.g) or not counter.is_cpu:
            return None
        if work.groups and pack.needs_ranks(work.layout, world):
            over_ranks[work.index] = work.groups, -(-Rows.whole(work.rows.shape).numel // world)
        fresh[work.index] = one, work
    reused: dict[int, tuple[CachedParam, abi.TensorStep]] = {}
    if isinstance(before, CpuCachedStep):
        both = zip(before.still_valid(context), before.tensors, strict=False)
        reused = {one.layout.index: (one, tensor) for one, tensor in both if one.layout.index not in fresh}
        places = {place: one.layout.index for place, one in enumerate(before.records)}
        over_ranks |= {places[i]: (one.groups, one.numel) for i, one in before.shared.items() if places[i] in reused}
    order = sorted([*fresh, *reused])
    tensors = (abi.TensorStep * len(order))()
    for target, index in zip(tensors, order, strict=True):
        if index in reused:
            pack.copy(target, reused[index][1])
        else:
            one, work = fresh[index]
            pack.describe_tensor(target, work, numbers[id(work.h)])
            target.counter = one.state["step"].data_ptr()
    shared = {}
    for place, index in enumerate(order):
        if index in over_ranks:
            alone = abi.TensorStep()
            pack.copy(alone, tensors[place])
            shared[place] = Shared(alone, *over_ranks[index])
    return CpuCachedStep(context, [(fresh.get(i) or reused[i])[0] for i in order], tensors, shared)
