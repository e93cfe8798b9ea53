"""What a plan knows of an optimizer: which parameters, groups and memory it was made for.

Describing a parameter to the kernels costs some ten microseconds of Python, more than stepping a small one. So plans
keep what they have described; before each step they look whether everything is as it was and take the new gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memopt.kernels import describe

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

    @classmethod
    def of(cls, work: Work) -> Entry:
        p, g, addresses = work.p, work.g, [t.data_ptr() for t in work.state.values()]
        strides = None if p.is_contiguous() and g.is_contiguous() else g.stride() + p.stride()
        return cls(work.name, p, work.state, p.shape, g.dtype, p.data_ptr(), addresses, strides)


class Known:
    """All parameters that had a gradient when the plan was made, and that the others had none."""

    def __init__(self, optimizer: Optimizer, entries: list[Entry]) -> None:
        self.spec, self.partition, self.seed = optimizer.spec, optimizer.partition, optimizer.seed
        self.groups = list(optimizer.param_groups)
        self.flags = [describe.flags(self.spec, group) for group in self.groups]
        self.all = [p for group in self.groups for p in group["params"]]
        self.entries = entries
        self.parameters = [entry.p for entry in entries]
        stepped = set(map(id, self.parameters))
        self.idle = [p for p in self.all if id(p) not in stepped]

    def same(self, optimizer: Optimizer) -> bool:
        """Whether spec, groups and parameters are those that the plan was made for."""
        groups = optimizer.param_groups
        same = optimizer.spec is self.spec and optimizer.partition is self.partition and optimizer.seed == self.seed
        if not same or len(groups) != len(self.groups):
            return False
        now = [p for group in groups for p in group["params"]]
        if len(now) != len(self.all) or any(a is not b for a, b in zip(now, self.all, strict=True)):
            return False
        if any(p.grad is not None for p in self.idle):
            return False
        return all(
            group is mine and describe.flags(self.spec, group) == flags
            for group, mine, flags in zip(groups, self.groups, self.flags, strict=True)
        )

    def gradients(self, optimizer: Optimizer) -> list[int] | None:
        """Where this step's gradients are; None if a parameter, its state or the kind of its gradient is another."""
        found = []
        all_state = optimizer.state
        for _, p, state, shape, dtype, address, addresses, strides in self.entries:
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
                return None
            found.append(g.data_ptr())
        return found
