"""What a plan knows of an optimizer: which parameters, groups and memory it was made for.

Describing a parameter to the kernels costs some ten microseconds of Python, more than stepping a small one. So plans
keep what they have described; before each step they look whether everything is as it was and take the new gradients.
Tensors are the same objects, and each has the address, the dtype, the shape and the strides that it had when it was
held against its layout: state that was replaced, and memory that was swapped or resized behind a tensor, are seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memopt.kernels import pack
from memopt.kernels.signature import Signature
from memopt.layout.replaced_state import is_plain

if TYPE_CHECKING:
    from memopt.kernels.context import StepContext
    from memopt.layout.param_step import Work


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether these are the same objects."""
    return len(a) == len(b) and all(map(is_, a, b))


class Known:
    """All parameters that had a gradient when the plan was made, and that the others had none."""

    recorded = False

    def __init__(self, context: StepContext, works: Sequence[Work]) -> None:
        self.spec, self.partition, self.seed = context.spec, context.partition, context.seed
        self.rule = works[0].layout.rule
        self.groups = list(context.groups)
        self.flags = [pack.flags(self.rule, group) for group in self.groups]
        self.all = [p for group in self.groups for p in group["params"]]
        self._lengths = [len(group["params"]) for group in self.groups]  # one may have gone to the group beside it
        self.names = [work.name for work in works]
        self.parameters = [work.p for work in works]
        stepped = set(map(id, self.parameters))
        self.idle = [p for p in self.all if id(p) not in stepped]
        # State: the dictionary's keys and values, what stands in each value, and what of that a step touches.
        self._owners = list(context.state)
        self._all_states = list(context.state.values())
        self._states = [work.state for work in works]
        self._keys = [("step", *work.layout.tensors) for work in works]
        self._layouts = [work.layout for work in works]
        self._entries = self._everything()
        self.tensors_of_state = self._touched()
        self._lasting: list[Tensor] = [*self.parameters, *self.tensors_of_state]
        self._addresses = list(map(Tensor.data_ptr, self._lasting))
        self._signature = Signature(self._lasting)
        self._gradients = Signature([work.g for work in works])

    def _touched(self) -> list[Any]:
        return [state.get(key) for state, keys in zip(self._states, self._keys, strict=True) for key in keys]

    def _everything(self) -> list[Any]:
        return list(chain.from_iterable([state.values() for state in self._states]))

    def same(self, context: StepContext) -> bool:
        """Whether spec, groups and parameters are those that the plan was made for."""
        groups = context.groups
        same = context.spec is self.spec and context.partition is self.partition and context.seed == self.seed
        if not same or not _same(groups, self.groups):
            return False
        if [len(group["params"]) for group in groups] != self._lengths:
            return False
        if not _same([p for group in groups for p in group["params"]], self.all):
            return False
        if self.idle and any(p.grad is not None for p in self.idle):
            return False
        return all(pack.flags(self.rule, group) == flags for group, flags in zip(groups, self.flags, strict=True))

    def _same_state(self, context: StepContext) -> bool:
        state = context.state
        if not (_same(list(state), self._owners) and _same(list(state.values()), self._all_states)):
            return False
        if not _same(self._everything(), self._entries):
            # Entries of the user's own may come and go; a moment in torch's plain layout is to be taken over.
            if not _same(self._touched(), self.tensors_of_state) or any(map(is_plain, self._layouts, self._states)):
                return False
            self._entries = self._everything()
        unmoved = list(map(Tensor.data_ptr, self._lasting)) == self._addresses
        return unmoved and self._signature.matches(self._lasting)

    def gradients(self, context: StepContext) -> list[int] | None:
        """Where this step's gradients are; None if a parameter, its state or the kind of its gradient is another."""
        if not self._same_state(context):
            return None
        gradients: list[Any] = [p.grad for p in self.parameters]
        return list(map(Tensor.data_ptr, gradients)) if self._gradients.matches(gradients) else None
