"""The parameters of an optimizer: who they are, what they were, and what the spec means for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, final
from weakref import ref

import torch
from torch import Tensor

from memopt.core.ledger import dtype_name
from memopt.core.user_warning import warn
from memopt.layout import param
from memopt.layout.steppable import STEPPED
from memopt.optim.edits.param_groups import LiveGroups, has_shape
from memopt.optim.layouts import Layouts, NumberedParam
from memopt.optim.replaced_params import are_vectors, flattened
from memopt.partitions.deepspeed.metadata import Made

if TYPE_CHECKING:
    from memopt.layout.param import ParamLayout
    from memopt.optim.setup import Setup

#: ``(name, parameter, group)``.
Named = tuple[str, Tensor, dict[str, Any]]


class Resolved(NamedTuple):
    """A parameter that may be stepped, with its layout."""

    layout: ParamLayout
    p: Tensor
    group: dict[str, Any]


@final
class Params:
    """``owner`` is the optimizer as torch.optim knows it: its ``param_groups`` and its ``state``, which anybody may
    have edited or replaced since they were looked at last."""

    def __init__(self, setup: Setup, owner: torch.optim.Optimizer) -> None:
        self.setup, self.owner = setup, owner
        self.live = LiveGroups()
        #: What the optimizer was made with, or what its groups had when they were looked at last.
        self.made: list[Made] = []
        self._seen: list[int] = []
        self._layouts = Layouts()

    def entries(self) -> Iterator[Named]:
        """``(name, parameter, group)`` in order; without names, the parameter's number."""
        groups = self.owner.param_groups
        if self.setup.partition.is_flattened or self._vectors():
            yield from self.setup.partition.entries(groups)
            return
        found = self.live.names(groups, self.setup.spec, self.owner.state)
        for group, names in zip(groups, found, strict=True):
            for name, p in zip(names, group["params"], strict=True):
                yield name, p, group

    def numbered(self) -> Iterator[tuple[int, str, Tensor, dict[str, Any]]]:
        """The same with the place among all."""
        return ((i, *entry) for i, entry in enumerate(self.entries()))

    # What they were --------------------------------------------------------------------------------------------

    def remember(self, edited: bool = False) -> None:
        """What the optimizer has as parameters, for another tool may replace it. Where groups were ``edited``, the
        shapes of parameters that were there stay those of their state."""
        before = {id(one.parameter()): one.shape for one in self.made} if edited else {}
        entries = list(self.entries())
        self.made = [
            Made(name, ref(p), before.get(id(p)) or (tuple(p.shape) if has_shape(p) else ()), group)
            for name, p, group in entries
        ]
        self._seen = [id(p) for _, p, _ in entries]

    def follow(self) -> bool:
        """Notice that another tool has put other tensors in the place of the parameters the optimizer was made with.
        True where the parameters are others than before.

        DTensors of the same shapes (FSDP2, through accelerate) and anything of the same shape go on. Vectors in place
        of matrices are DeepSpeed's: the optimizer goes on over the partition that
        :func:`memopt.optim.replaced_params.flattened` finds. State that was made for parameters that are gone is said
        once, in a warning.
        """
        if self.setup.partition.is_flattened or self._ids() == self._seen:
            return False
        if self._vectors():
            self.setup.partition = flattened(self.setup.spec, self.made, self.owner.param_groups)
            self._seen = self._ids()
            return False
        swapped = self.live.swapped
        self.remember(edited=True)
        if self.live.swapped > swapped:
            self._warn_of_orphans()
        return True

    def _ids(self) -> list[int]:
        return [id(p) for group in self.owner.param_groups for p in group["params"]]

    def _vectors(self) -> bool:
        """Whether what stands in the groups are DeepSpeed's vectors, and not what was put there by the owner."""
        if not self.made or self._ids() == self._seen:
            return False
        return are_vectors(self.made, [p for group in self.owner.param_groups for p in group["params"]])

    def _warn_of_orphans(self) -> None:
        here = set(self._seen)
        orphans = sum(1 for p, state in self.owner.state.items() if state and id(p) not in here)
        if orphans:
            warn(
                f"the optimizer holds state of {orphans} parameters that it no longer has: something "
                "(accelerate.prepare, fully_shard) replaced them after the state was made. Make or load the state "
                "afterwards"
            )

    # What the spec means for them ------------------------------------------------------------------------------

    def layouts_of(self, entries: Iterable[NumberedParam]) -> list[ParamLayout]:
        """The layouts of these, each resolved once."""
        setup = self.setup
        return self._layouts.of(entries, setup.spec, setup.partition, setup.seed)

    def resolved(self) -> list[Resolved]:
        """Every parameter that may be stepped: that has a shape, and a dtype that rules can step."""
        entries = [one for one in self.numbered() if has_shape(one[2]) and one[2].dtype in STEPPED]
        return [Resolved(layout, p, g) for layout, (_, _, p, g) in zip(self.layouts_of(entries), entries, strict=True)]

    def resolve(self, name: str, p: Tensor, h: Mapping[str, Any]) -> ParamLayout:
        """The layout that a parameter would have with the hyperparameters ``h``."""
        setup = self.setup
        return param.resolve_layout(setup.spec, h, name, 0, setup.partition.local_rows(p), dtype_name(p), setup.seed)
