"""A whole optimizer's step on the CPU, prepared once and repeated while nothing but the gradients changes.

If anything else does, the step goes the long way, and a new plan is made.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from memopt.kernels import abi, pack
from memopt.kernels.cached_entries import Known, Record, record
from memopt.kernels.huge_pages import SMALLEST, Pages
from memopt.kernels.loader import library

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.kernels.context import StepContext, StepOutcome
    from memopt.layout.param_step import Work

_SIZE = ctypes.sizeof(abi.TensorStep)


class Plan(Known):
    """The descriptors of all parameters that have had a gradient; made by :func:`make`."""

    #: The host knows what gradients are multiplied by when it steps.
    on_device = False
    norm: Tensor | None = None

    def __init__(self, context: StepContext, records: Sequence[Record], tensors: ctypes.Array[abi.TensorStep]) -> None:
        super().__init__(context, records)
        self.tensors = tensors
        self.integrity = context.integrity
        self.spans = (abi.Span * len(records))()
        for span, tensor, one in zip(self.spans, tensors, records, strict=True):
            # Of a parameter that is whole on every rank all of the gradient is looked at: ranks must see the same.
            _, _, _, shape, _ = one.like
            span.numel, span.dtype = shape.numel(), tensor.g_dtype
        self.hyper = (abi.Group * len(self.groups))()
        self._offsets = [one.offset for one in records]
        self._shifted = any(self._offsets)
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
        if self._missing or len(self.parameters) < len(self.known):
            self._leave_out([i for i, address in enumerate(addresses) if address < 0])
        for span, address in zip(self.spans, addresses, strict=True):
            span.data = address
        if self._shifted:
            addresses = list(map(int.__add__, addresses, self._offsets))
        for tensor, address in zip(self.tensors, addresses, strict=True):
            tensor.g = address
        return True

    def _leave_out(self, missing: list[int]) -> None:
        """Only these have no gradient."""
        if missing != self._missing:
            for i in self._missing:
                self.tensors[i].idle = self.spans[i].idle = 0
            for i in missing:
                self.tensors[i].idle = self.spans[i].idle = 1
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
        bad: list[str] = []
        start = time.perf_counter()
        for group, scale in zip(self.hyper, scales, strict=True):
            group.gradient_scale = scale
        partition, parameters = self.partition, self.parameters
        with self.integrity.changing("a step") if partition.world_size > 1 else nullcontext():
            # One travels while the next is stepped. A bucket ends behind its last parameter that has a gradient.
            missing = set(self._missing)
            places = [i for i in range(len(self.known)) if i not in missing]
            for first, stop in partition.buckets(parameters):
                bad = self._step(places[first], places[stop - 1] + 1)
                partition.all_gather_begin(parameters[first:stop])
            partition.all_gather_wait()
        self.pages.after(time.perf_counter() - start)
        return bad

    def _step(self, first: int, stop: int) -> list[str]:
        found = library()
        assert found is not None
        unseen, self._unseen = self._unseen, False
        code = found.handle.memopt_step(
            ctypes.byref(self.hyper),
            ctypes.byref(self.tensors, first * _SIZE),
            stop - first,
            self.seed & 0xFFFFFFFF,
            torch.get_num_threads(),
            found.index,
            abi.ALONE,
            unseen,
        )
        if code == 1:
            raise MemoryError("the kernels could not allocate their list of tensors; nothing was changed")
        if code == 3:  # nothing was stepped: for a gradient, or because fp32 cannot hold the square of a finite one
            return [self.names[i] for i in look(self.spans, False)] or self._step(first, stop)
        return []

    def settle(self) -> StepOutcome | None:
        """Nothing is left to be noted: the kernels are done when a step returns."""
        return None

    def skipped_on_device(self) -> int:
        return 0


def _several_passes(one: Record, tensor: abi.TensorStep) -> bool:
    return tensor.format in abi.ALL_FACTORED or one.layout.rule.inner in abi.SEVERAL_PASSES


def look(spans: ctypes.Array[abi.Span], summed: bool) -> list[int]:
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
    in_place: Callable[[str, torch.device], bool],
    before: object,
) -> Plan | None:
    """A plan for these parameters, after they have stepped, and for those that ``before`` knew; None where not all of
    them can go this way."""
    if library() is None or not works or context.spec.engine != "native" or not context.partition.plannable:
        return None
    world = context.partition.world_size
    numbers = {id(group): i for i, group in enumerate(context.groups)}
    fresh: dict[int, tuple[Record, Work]] = {}
    for work in works:
        p, counter = originals[work.index], work.state["step"]
        one = record(context, work, p)
        if one is None or not in_place(work.name, p.device) or not pack.is_dense(one.like):
            return None
        if pack.refuse(work.layout, work.p, work.g) or not counter.is_cpu:
            return None
        if work.groups and pack.needs_ranks(work.layout, world):
            return None  # it takes sums over the ranks within the step
        fresh[work.index] = one, work
    kept: dict[int, tuple[Record, abi.TensorStep]] = {}
    if isinstance(before, Plan):
        both = zip(before.still_known(context), before.tensors, strict=False)
        kept = {one.layout.index: (one, tensor) for one, tensor in both if one.layout.index not in fresh}
    order = sorted([*fresh, *kept])
    tensors = (abi.TensorStep * len(order))()
    for target, index in zip(tensors, order, strict=True):
        if index in kept:
            pack.copy(target, kept[index][1])
        else:
            one, work = fresh[index]
            pack.describe(target, work, numbers[id(work.h)])
            target.counter = one.state["step"].data_ptr()
    return Plan(context, [(fresh.get(i) or kept[i])[0] for i in order], tensors)
