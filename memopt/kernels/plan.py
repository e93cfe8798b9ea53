"""A whole optimizer's step on the CPU, prepared once and repeated while nothing but the gradients changes.

If anything else does, the step goes the long way, and a new plan is made.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from memopt.engines.native import moment_formats
from memopt.kernels import abi, describe
from memopt.kernels.known import Entry, Known
from memopt.kernels.loader import library
from memopt.kernels.pages import SMALLEST, Pages

if TYPE_CHECKING:
    from memopt.engines.work import Work
    from memopt.optimizer import Optimizer


class Plan(Known):
    """The descriptors of all parameters that had a gradient; made by :func:`make`."""

    takes_scale = False

    def __init__(self, optimizer: Optimizer, entries: list[Entry], tensors: ctypes.Array[abi.TensorStep]) -> None:
        super().__init__(optimizer, entries)
        self.tensors = tensors
        self.spans = (abi.Span * len(entries))()
        for span, tensor in zip(self.spans, tensors, strict=True):
            span.numel, span.dtype = tensor.numel, tensor.g_dtype
        self.hyper = (abi.Group * len(self.groups))()
        # What looks at the gradients refers to their descriptors and not to the plan: memory is freed with the last
        # reference to the optimizer, without waiting for the garbage collector.
        spans = self.spans
        large = [(i, p.nbytes) for i, p in enumerate(self.parameters) if p.nbytes >= SMALLEST]
        lasting = [x for entry in entries for x in (entry.p, *entry.state.values())]
        self.pages = Pages(
            [(x.data_ptr(), x.nbytes) for x in lasting], lambda: [(spans[i].data, nbytes) for i, nbytes in large]
        )

    def refresh(self, optimizer: Optimizer) -> bool:
        """Take this step's gradients and hyperparameters; False if anything else is not as it was."""
        if not self.same(optimizer):
            return False
        for i, group in enumerate(self.groups):
            self.hyper[i] = describe.describe_group(self.spec, group)
        addresses = self.gradients(optimizer)
        if addresses is None:
            return False
        for tensor, span, address in zip(self.tensors, self.spans, addresses, strict=True):
            tensor.g = span.data = address
        return True

    def non_finite(self) -> list[str]:
        """The names of parameters whose gradient holds a NaN or an Inf."""
        found = library()
        assert found is not None
        if found.handle.memopt_all_finite(
            ctypes.byref(self.spans), len(self.entries), torch.get_num_threads(), found.index
        ):
            return []
        return [entry.name for entry, span in zip(self.entries, self.spans, strict=True) if span.bad]

    def step(self, seed: int) -> None:
        """Step all parameters; the kernels count the steps."""
        found = library()
        assert found is not None
        start = time.perf_counter()
        if found.handle.memopt_step(
            ctypes.byref(self.hyper),
            ctypes.byref(self.tensors),
            len(self.entries),
            seed & 0xFFFFFFFF,
            torch.get_num_threads(),
            found.index,
            abi.ALONE,
        ):
            raise MemoryError("the kernels could not allocate their list of tensors; nothing was changed")
        self.pages.after(time.perf_counter() - start)

    def settle(self) -> None:
        """Nothing is left to be noted: the kernels are done when a step returns."""

    def skipped_on_device(self) -> int:
        return 0


def make(optimizer: Optimizer, works: Sequence[Work]) -> Plan | None:
    """A plan for these parameters, after they have stepped; None where not all of them can go this way."""
    spec, partition = optimizer.spec, optimizer.partition
    if library() is None or spec.engine != "native" or partition.world_size > 1 or not works:
        return None
    numbers = {id(group): i for i, group in enumerate(optimizer.param_groups)}
    originals = {i: p for i, (_, p, _) in enumerate(optimizer._parameters())}
    tensors = (abi.TensorStep * len(works))()
    entries = []
    for target, work in zip(tensors, works, strict=True):
        p, counter = originals[work.index], work.state["step"]
        g, placed = p.grad, optimizer.homes.in_place(work.name, p.device)
        # Views of a part of the parameter (a rank's rows) would have to be cut again at every step.
        if g is None or not placed or work.p is not p or not describe.dense(g):
            return None
        moments = moment_formats(spec, work.h, work.name, work.rows)
        if describe.refuse(spec, moments, work.rows, p, g):
            return None
        if describe.describe(target, spec, work, moments, numbers[id(work.h)]):
            return None
        if counter.dtype is not torch.float32 or not counter.is_cpu:
            return None
        target.counter = counter.data_ptr()
        entries.append(Entry.of(work))
    return Plan(optimizer, entries, tensors)
