"""A whole optimizer's step on the CPU, prepared once and repeated while nothing but the gradients changes.

If anything else does, the step goes the long way, and a new plan is made.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from memopt.kernels import abi, pack
from memopt.kernels.cached_entries import Known
from memopt.kernels.huge_pages import SMALLEST, Pages
from memopt.kernels.loader import library

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.kernels.context import StepContext, StepOutcome
    from memopt.layout.param_step import Work


class Plan(Known):
    """The descriptors of all parameters that had a gradient; made by :func:`make`."""

    takes_scale = False

    def __init__(self, context: StepContext, works: Sequence[Work], tensors: ctypes.Array[abi.TensorStep]) -> None:
        super().__init__(context, works)
        self.tensors = tensors
        self.spans = (abi.Span * len(works))()
        for span, tensor in zip(self.spans, tensors, strict=True):
            span.numel, span.dtype = tensor.numel, tensor.g_dtype
        self.hyper = (abi.Group * len(self.groups))()
        # What looks at the gradients refers to their descriptors and not to the plan: memory is freed with the last
        # reference to the optimizer, without waiting for the garbage collector.
        spans = self.spans
        large = [(i, p.nbytes) for i, p in enumerate(self.parameters) if p.nbytes >= SMALLEST]
        lasting = [*self.parameters, *self.tensors_of_state]
        self.pages = Pages(
            [(x.data_ptr(), x.nbytes) for x in lasting], lambda: [(spans[i].data, nbytes) for i, nbytes in large]
        )

    def check_recording(self) -> None:
        """No graph records what runs on the host."""

    def refresh(self, context: StepContext) -> bool:
        """Take this step's gradients and hyperparameters; False if anything else is not as it was."""
        if not self.same(context):
            return False
        for i, group in enumerate(self.groups):
            self.hyper[i] = pack.describe_group(self.rule, group)
        addresses = self.gradients(context)
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
            ctypes.byref(self.spans), len(self.names), torch.get_num_threads(), found.index
        ):
            return []
        return [name for name, span in zip(self.names, self.spans, strict=True) if span.bad]

    def step(self) -> None:
        """Step all parameters; the kernels count the steps."""
        found = library()
        assert found is not None
        start = time.perf_counter()
        if found.handle.memopt_step(
            ctypes.byref(self.hyper),
            ctypes.byref(self.tensors),
            len(self.names),
            self.seed & 0xFFFFFFFF,
            torch.get_num_threads(),
            found.index,
            abi.ALONE,
        ):
            raise MemoryError("the kernels could not allocate their list of tensors; nothing was changed")
        self.pages.after(time.perf_counter() - start)

    def settle(self) -> StepOutcome | None:
        """Nothing is left to be noted: the kernels are done when a step returns."""
        return None

    def skipped_on_device(self) -> int:
        return 0


def make(
    context: StepContext,
    works: Sequence[Work],
    originals: Mapping[int, Tensor],
    in_place: Callable[[str, torch.device], bool],
) -> Plan | None:
    """A plan for these parameters, after they have stepped; None where not all of them can go this way."""
    if library() is None or context.spec.engine != "native" or context.partition.world_size > 1 or not works:
        return None
    numbers = {id(group): i for i, group in enumerate(context.groups)}
    tensors = (abi.TensorStep * len(works))()
    for target, work in zip(tensors, works, strict=True):
        p, counter = originals[work.index], work.state["step"]
        g = p.grad
        # Views of a part of the parameter (a rank's rows) would have to be cut again at every step.
        if g is None or not in_place(work.name, p.device) or work.p is not p or not pack.dense(g):
            return None
        if pack.refuse(work.layout, p, g) or not counter.is_cpu:
            return None
        pack.describe(target, work, numbers[id(work.h)])
        target.counter = counter.data_ptr()
    return Plan(context, works, tensors)
