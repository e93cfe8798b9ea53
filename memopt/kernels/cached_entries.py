"""What a plan knows of an optimizer: which parameters, groups and memory it was made for.

Describing a parameter to the kernels costs some ten microseconds of Python, more than stepping a small one. So plans
keep what they have described; before each step they look whether everything is as it was and take the new gradients.
Tensors are the same objects, and each has the address, the dtype, the shape and the strides that it had when it was
held against its layout: state that was replaced, and memory that was swapped or resized behind a tensor, are seen.

Parameters without a gradient are left out of a step and stay cached: which ones have gradients may change from step to
step (mixture of experts, layers that are dropped). Only one that was never met makes another plan, which takes over
what the one before it knew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from memopt.kernels import pack
from memopt.kernels.signature import Signature, kind_of
from memopt.layout.replaced_state import is_plain
from memopt.rules import RULES

if TYPE_CHECKING:
    from memopt.kernels.context import StepContext
    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work


class CachedParam(NamedTuple):
    """A parameter that has stepped: ``p`` as the optimizer has it, ``local`` the rows of it that are stepped here.
    ``like`` says what its gradient is, ``offset`` how many bytes after its beginning the rows of it begin."""

    layout: ParamLayout
    p: Tensor
    local: Tensor
    state: dict[str, Tensor]
    group: Mapping[str, Any]
    like: tuple[Any, ...]
    offset: int


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether these are the same objects."""
    return len(a) == len(b) and all(map(is_, a, b))


def record(context: StepContext, work: Work, p: Tensor) -> CachedParam | None:
    """That of a parameter which has stepped; None where its gradient is not memory that is simply here."""
    grad = None if p.grad is None else context.partition.memory_of(p, p.grad)
    if grad is None or type(grad) is not Tensor:
        return None
    offset = work.g.data_ptr() - grad.data_ptr() if work.g.numel() else 0
    return CachedParam(work.layout, p, work.p, work.state, work.h, kind_of(grad), offset)


class CachedEntries:
    """All parameters that had a gradient when the plan was made, or when one before it was."""

    recorded = False

    def __init__(self, context: StepContext, records: Sequence[CachedParam]) -> None:
        self.spec, self.partition, self.seed = context.spec, context.partition, context.seed
        self.groups = list(context.groups)
        self.rules = [RULES[context.spec.rule_of(group)] for group in self.groups]
        self.flags = self._flags(self.groups)
        self.all = [p for group in self.groups for p in group["params"]]
        self._lengths = [len(group["params"]) for group in self.groups]  # one may have gone to the group beside it
        self.records = list(records)
        self.names = [one.layout.name for one in records]
        self.cached = [one.p for one in records]
        #: Those that step this time.
        self.parameters = self.cached
        there = set(map(id, self.cached))
        self._uncached = [p for p in self.all if id(p) not in there]
        memory = self._memory()
        self._elsewhere = not _same(memory, self.cached)  # what is here of a DTensor is another tensor
        # State: the dictionary's keys and values, what stands in each value, and what of that a step touches.
        self._owners = list(context.state)
        self._all_states = list(context.state.values())
        self._states = [one.state for one in records]
        self._keys = [("step", *one.layout.tensors) for one in records]
        self._layouts = [one.layout for one in records]
        self._entries = self._everything()
        self.tensors_of_state = self._touched()
        self.lasting: list[Tensor] = [*memory, *self.tensors_of_state]
        self._addresses = list(map(Tensor.data_ptr, self.lasting))
        self._signature = Signature(self.lasting)
        self._kinds = [one.like for one in records]
        self._gradients: Signature | None = None  # of all of them

    def _memory(self) -> list[Any]:
        return [self.partition.memory_of(p, p) for p in self.cached]

    def _flags(self, groups: Sequence[Any]) -> list[int]:
        return [pack.flags(rule, group) for rule, group in zip(self.rules, groups, strict=True)]

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
        return self._flags(groups) == self.flags

    def _same_memory(self) -> bool:
        """Whether parameters and what a step touches of their state lie where they lay, as they were."""
        if not _same(self._everything(), self._entries):
            # Entries of the user's own may come and go; a moment in torch's plain layout is to be taken over.
            if not _same(self._touched(), self.tensors_of_state) or any(map(is_plain, self._layouts, self._states)):
                return False
            self._entries = self._everything()
        if self._elsewhere and not _same(self._memory(), self.lasting[: len(self.cached)]):
            return False
        unmoved = list(map(Tensor.data_ptr, self.lasting)) == self._addresses
        return unmoved and self._signature.matches(self.lasting)

    def follow_state(self) -> None:
        """A step has put other tensors into the state, of the same kinds."""
        self._entries, self.tensors_of_state = self._everything(), self._touched()
        self.lasting[len(self.cached) :] = self.tensors_of_state
        self._addresses = list(map(Tensor.data_ptr, self.lasting))

    def still_valid(self, context: StepContext) -> list[CachedParam]:
        """What the plan after this one takes over: everything, or nothing where something else has changed."""
        states = context.state
        same = self.same(context) and all(states.get(one.p) is one.state for one in self.records)
        return self.records if same and self._same_memory() else []

    def gradients(self, context: StepContext) -> list[int] | None:
        """Where this step's gradients are, -1 for one that is not there. None if a parameter, its state or the kind of
        its gradient is another, and where one that is not cached has a gradient, or none has."""
        state = context.state
        if any(p.grad is not None for p in self._uncached):
            return None
        if not (_same(list(state), self._owners) and _same(list(state.values()), self._all_states)):
            return None
        if not self._same_memory():
            return None
        found: list[Any] = [p.grad for p in self.cached]
        if self._elsewhere:
            memory_of = self.partition.memory_of
            found = [g if g is None else memory_of(p, g) for p, g in zip(self.cached, found, strict=True)]
        if any(g is None for g in found):
            return self._some(found)
        if self._gradients is None:
            self._gradients = Signature(found) if list(map(kind_of, found)) == self._kinds else None
        if self._gradients is None or not self._gradients.matches(found):
            return None
        self.parameters = self.cached
        return list(map(Tensor.data_ptr, found))

    def _some(self, found: list[Any]) -> list[int] | None:
        """The same where gradients are missing."""
        if any(g is not None and kind_of(g) != kind for g, kind in zip(found, self._kinds, strict=True)):
            return None
        self.parameters = [p for p, g in zip(self.cached, found, strict=True) if g is not None]
        return [-1 if g is None else g.data_ptr() for g in found] if self.parameters else None
