"""A whole optimizer's step, prepared once and repeated while nothing but the gradients changes.

Describing a parameter to the kernels costs some ten microseconds of Python, more than stepping a small one. A plan
keeps the descriptors; before each step it looks whether parameters, groups, state and their memory are those that it
knows and takes the new gradients' addresses. If anything is different it says so, the step
goes the long way, and a new plan is made.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memopt.engines.native import moment_formats
from memopt.kernels import abi, describe
from memopt.kernels.loader import library
from memopt.kernels.pages import SMALLEST, Pages
from memopt.ledger import dtype_name
from memopt.masters import master_of

if TYPE_CHECKING:
    from memopt.engines.work import Work
    from memopt.optimizer import Optimizer


class Entry(NamedTuple):
    name: str
    p: Tensor
    state: dict[str, Tensor]
    shape: torch.Size
    grad_dtype: torch.dtype
    address: int
    addresses: list[int]  # of the state
    strides: tuple[int, ...] | None  # of the gradient and the parameter where it or the parameter is not contiguous


class Plan:
    """The descriptors of all parameters that had a gradient; made by :func:`make`."""

    takes_scale = False

    def __init__(self, optimizer: Optimizer, entries: list[Entry], tensors: ctypes.Array[abi.TensorStep]) -> None:
        self.spec = optimizer.spec
        self.partition = optimizer.partition
        self.groups = list(optimizer.param_groups)
        self.flags = [describe.flags(self.spec, group) for group in self.groups]
        self.all = [p for group in self.groups for p in group["params"]]
        self.entries = entries
        self.parameters = [entry.p for entry in entries]
        stepped = set(map(id, self.parameters))
        self.idle = [p for p in self.all if id(p) not in stepped]
        self.tensors = tensors
        self.spans = (abi.Span * len(entries))()
        for span, tensor in zip(self.spans, tensors, strict=True):
            span.numel, span.dtype = tensor.numel, tensor.g_dtype
        self.hyper = (abi.Group * len(self.groups))()
        large = [i for i, p in enumerate(self.parameters) if p.nbytes >= SMALLEST]
        lasting = [x for entry in entries for x in (entry.p, *entry.state.values())]
        self.pages = Pages([(x.data_ptr(), x.nbytes) for x in lasting],
                           lambda: [(self.spans[i].data, self.parameters[i].nbytes) for i in large])  # fmt: skip

    def refresh(self, optimizer: Optimizer) -> bool:
        """Take this step's gradients and hyperparameters; False if anything else is not as it was."""
        groups = optimizer.param_groups
        same = optimizer.spec is self.spec and optimizer.partition is self.partition
        if not same or len(groups) != len(self.groups):
            return False
        now = [p for group in groups for p in group["params"]]
        if len(now) != len(self.all) or any(a is not b for a, b in zip(now, self.all, strict=True)):
            return False
        if any(p.grad is not None for p in self.idle):
            return False
        for i, group in enumerate(groups):
            if group is not self.groups[i] or describe.flags(self.spec, group) != self.flags[i]:
                return False
            self.hyper[i] = describe.describe_group(self.spec, group)
        all_state = optimizer.state
        for i, (_, p, state, shape, dtype, address, addresses, strides) in enumerate(self.entries):
            g = p.grad
            if (
                type(g) is not Tensor
                or g.layout is not torch.strided
                or g.dtype is not dtype
                or (not g.is_contiguous() if strides is None else g.stride() + p.stride() != strides)
                or p.data_ptr() != address
                or p.shape != shape
                or (strides is None and not p.is_contiguous())
                or all_state.get(p) is not state
                or [t.data_ptr() for t in state.values()] != addresses
            ):
                return False
            self.tensors[i].g = self.spans[i].data = g.data_ptr()
        return True

    def non_finite(self) -> list[str]:
        """The names of parameters whose gradient holds a NaN or an Inf."""
        found = library()
        assert found is not None
        if found.handle.memopt_all_finite(ctypes.byref(self.spans), len(self.entries), torch.get_num_threads(),
                                          found.index):  # fmt: skip
            return []
        return [entry.name for entry, span in zip(self.entries, self.spans, strict=True) if span.bad]

    def step(self, seed: int) -> None:
        """Step all parameters; the kernels count the steps."""
        found = library()
        assert found is not None
        start = time.perf_counter()
        if found.handle.memopt_step(ctypes.byref(self.hyper), ctypes.byref(self.tensors), len(self.entries),
                                    seed & 0xFFFFFFFF, torch.get_num_threads(), found.index):  # fmt: skip
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
    names = {i: (name, p) for i, (name, p, _) in enumerate(optimizer._parameters())}
    tensors = (abi.TensorStep * len(works))()
    entries = []
    for target, work in zip(tensors, works, strict=True):
        name, p = names[work.index]
        g, counter = p.grad, work.state["step"]
        placed = optimizer.homes.in_place(name, p.device)
        # Views of a part of the parameter (a rank's rows) would have to be cut again at every step.
        if g is None or not placed or work.p is not p or not describe.dense(g):
            return None
        moments = moment_formats(spec, work.h, name, work.rows)
        if describe.refuse(spec, moments, work.rows, p, g, partition.world_size):
            return None
        if describe.describe(target, work, moments, numbers[id(work.h)], master_of(spec, dtype_name(p))):
            return None
        if counter.dtype is not torch.float32 or not counter.is_cpu:
            return None
        target.counter = counter.data_ptr()
        addresses = [t.data_ptr() for t in work.state.values()]
        strides = None if p.is_contiguous() and g.is_contiguous() else g.stride() + p.stride()
        entries.append(Entry(name, p, work.state, p.shape, g.dtype, p.data_ptr(), addresses, strides))
    return Plan(optimizer, entries, tensors)
