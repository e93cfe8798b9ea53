"""How the state of all parameters is exchanged for state of another spec, and what is left where that is stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.compatibility import Fill
from memopt.checkpoint.conversion.param_state import ParamState, fill_state
from memopt.checkpoint.conversion.report import Conversion
from memopt.checkpoint.state.all_rows import record_of_all
from memopt.checkpoint.state.moment_codes import moment_codes
from memopt.checkpoint.state.partial_spec import mixture
from memopt.checkpoint.state.saved import Record
from memopt.layout.replaced_state import own_entries
from memopt.partitions import Partition
from memopt.partitions.ranks import Ranks
from memopt.partitions.zero1 import Zero1
from memopt.placements.base import PlacementStore
from memopt.placements.stores.by_placement import PlacementStores
from memopt.spec import OptimSpec

if TYPE_CHECKING:
    from memopt.optim.parts import OptimizerParts

#: A parameter with its state as it is and as it will be.
Todo = list[tuple[Tensor, ParamState, ParamState]]


@dataclass
class PendingConversion:
    """A conversion: what it was asked for, what it has decided, and the parameters it still has to do."""

    old: OptimSpec
    new: OptimSpec
    given: Mapping[str, Any]
    fill: Fill
    hypers: list[dict[str, Any]]  # of each param group
    partition: Partition
    placement_stores: PlacementStores
    every: list[ParamState]  # of every parameter, with state or without
    todo: Todo
    report: Conversion
    ranks: Ranks | None
    done: int = 0
    between: bool = False  # whether what the optimizer has is neither of the old spec nor of a new one

    def __str__(self) -> str:
        """For whoever wants something else of the optimizer while it is unfinished."""
        old, new = str(self.old), str(self.new)
        return (
            f"{self.done} of {self.done + len(self.todo)} parameters are as {new!r} keeps them and the others as "
            f"{old!r}, which is no optimizer: the same call, opt.convert_({new!r}, ...), goes on with the rest; "
            "until then nothing else can be done but to load a checkpoint"
        )


def move(optimizer: OptimizerParts, placement_stores: PlacementStores) -> None:
    """State is in these stores now."""
    optimizer.placement_stores, left = placement_stores, optimizer.placement_stores
    optimizer.store.register_params()
    optimizer.store.flush()
    left.replaced_by(placement_stores)


def change_of(work: PendingConversion) -> Callable[[OptimizerParts, PendingConversion], None]:
    """The way to do it that leaves most where it is stopped."""
    if _stores_the_same(work.old, work.new, work.todo):
        return _one_by_one
    elsewhere = any(
        type(param.placement_stores.of(param.name)) is not PlacementStore for _, *both in work.todo for param in both
    )
    return _all_or_none if elsewhere else _one_by_one_or_unfinished


def _stores_the_same(old: OptimSpec, new: OptimSpec, todo: Todo) -> bool:
    """Whether only formats and places change: what is half done then is an optimizer too, and a spec can say it."""
    axes = ("rule", "master", "partition", "engine")
    same = all(getattr(old, axis) == getattr(new, axis) for axis in axes)
    same = same and all(here.rule == there.rule for _, here, there in todo)
    same = same and all(new.options.get(k, v) == v for k, v in old.options.items())
    return same and all(
        [m.name for m, _ in moment_codes(here.spec, here.h, here.name, here.shape)]
        == [m.name for m, _ in moment_codes(there.spec, there.h, there.name, there.shape)]
        for _, here, there in todo
    )


def _one_by_one(optimizer: OptimizerParts, work: PendingConversion) -> None:
    """Each parameter's new state replaces its old one before the next is made."""
    old, new, todo, done = work.old, work.new, work.todo, []
    try:
        for entry in todo:
            state = _made(optimizer, work, entry)
            work.between = True
            _replace(optimizer.state[entry[0]], state, entry[1].rule)
            done.append(entry[1].name)
            work.between = len(done) == len(todo)  # until the optimizer is of the new spec
    except BaseException as error:
        if work.between or not todo:
            raise
        work.between = True
        stopped = todo[len(done)]
        _put_back(optimizer, stopped)
        now, mixed = (
            optimizer.partition,
            mixture(old, new, done, {name: work.old.rule_of(group) for name, _, group in optimizer.params.entries()}),
        )
        placement_stores = PlacementStores(
            mixed, now.rank, now.world_size, optimizer.placement_stores, stopped[2].placement_stores
        )
        optimizer.spec = mixed
        move(optimizer, placement_stores)
        work.between = False
        what = f"{len(done)} of {len(todo)} parameters are as {str(new)!r} keeps them and the others as {str(old)!r}"
        _say(error, stopped[1].name, f"{what}: the overrides of the spec say so, and training can go on")
        raise


def _one_by_one_or_unfinished(optimizer: OptimizerParts, work: PendingConversion) -> None:
    """The same where no spec can say what is half done: parameters of two rules are no optimizer. What comes out with
    the same bits is the old tensor."""
    try:
        while work.todo:
            p, here, there = work.todo[0]
            state = _made(optimizer, work, work.todo[0])
            if here.spec.for_parameter(here.name)[1] == there.spec.for_parameter(there.name)[1]:
                _share(optimizer.state[p], state)
            work.between = True
            _replace(optimizer.state[p], state, here.rule)
            del work.todo[0]
            work.done += 1
            work.between = not work.todo
    except BaseException as error:
        if work.between:
            raise
        if not work.done:
            _say(error, work.todo[0][1].name, f"Nothing was changed, it is still {str(optimizer.spec)!r}")
            raise
        optimizer.unfinished = work
        _say(error, work.todo[0][1].name, str(work))
        raise


def _all_or_none(optimizer: OptimizerParts, work: PendingConversion) -> None:
    """Old state is given up when all of the new is there: stores that know parameters by name, and outlive the process,
    have state of one rule."""
    made: list[tuple[Tensor, dict[str, Tensor]]] = []
    try:
        for p, here, there in work.todo:
            state = _made(optimizer, work, (p, here, there))
            if here.spec.for_parameter(here.name)[1] == there.spec.for_parameter(there.name)[1] == "device":
                _share(optimizer.state[p], state)
            made.append((p, state))
        work.between = True
        for (p, state), (_, here, _) in zip(made, work.todo, strict=True):
            _replace(optimizer.state[p], state, here.rule)
    except BaseException as error:
        if work.between or not work.todo:
            raise
        work.between = True
        for entry in work.todo[: len(made) + 1]:
            _put_back(optimizer, entry)
        work.between = False
        stopped = work.todo[min(len(made), len(work.todo) - 1)][1].name
        _say(error, stopped, f"Nothing was changed, it is still {str(optimizer.spec)!r}")
        raise


def _put_back(optimizer: OptimizerParts, entry: tuple[Tensor, ParamState, ParamState]) -> None:
    """A placement's store that knows parameters by name, and has made room for the new state, gets the old state
    again."""
    p, here, there = entry
    placement_store = here.placement_stores.of(here.name)
    if placement_store is there.placement_stores.of(there.name) and not placement_store.holds(
        here.name, optimizer.state[p]
    ):
        room = here.allocate()
        for key, tensor in room.items():
            tensor.copy_(optimizer.state[p][key])
        _replace(optimizer.state[p], room, here.rule)


def _made(
    optimizer: OptimizerParts, work: PendingConversion, entry: tuple[Tensor, ParamState, ParamState]
) -> dict[str, Tensor]:
    """The new state of one parameter, made on every rank or given up on every rank."""
    p, here, there = entry
    error, state, report = None, None, Conversion("", "")
    try:
        state = there.allocate()
        record = _record(optimizer, here, there, optimizer.state[p])
        fill_state(there, state, record, (here.spec, here.h), work.fill, report)
    except BaseException as failure:
        error = failure
    if work.ranks is not None:
        work.ranks.agree(error)
    elif error is not None:
        raise error
    assert state is not None
    work.report.add(report)
    return state


def _record(optimizer: OptimizerParts, here: ParamState, there: ParamState, state: Mapping[str, Tensor]) -> Record:
    now = optimizer.partition
    if here.spec.partition != there.spec.partition and isinstance(now, Zero1) and now.world_size > 1:
        return record_of_all(here, state, now)
    return here.record(state)


def _replace(state: dict[str, Tensor], made: dict[str, Tensor], rule: str) -> None:
    """The step keeps its tensor, which others may hold, and what is the user's own stays."""
    made["step"] = state["step"].copy_(made["step"])
    own = own_entries(rule, state)
    state.clear()
    state.update({**made, **own})


def _share(state: Mapping[str, Tensor], made: dict[str, Tensor]) -> None:
    for key, tensor in made.items():
        old = state.get(key)
        if key != "step" and old is not None and (old.dtype, old.shape) == (tensor.dtype, tensor.shape):
            a, b = (x.reshape(-1).view(torch.uint8) for x in (old, tensor))
            if old.device == tensor.device and torch.equal(a, b):
                made[key] = old


def _say(error: BaseException, name: str, what: str) -> None:
    """Raise one sentence for what memory and disks do; anything else is for the caller to raise again."""
    if isinstance(error, (OSError, RuntimeError, MemoryError)):
        raise RuntimeError(f"convert_ stopped at {name}: {error}. {what}") from error
