"""``optimizer.convert_(spec)``: another spec in place, in the middle of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint.codes import moment_codes
from memopt.checkpoint.everyone import record_of_all
from memopt.checkpoint.fit import Slot, fill_slot
from memopt.checkpoint.mixture import mixture
from memopt.checkpoint.plan import Fill, check_fill, target_hyper, target_spec, unused_fill
from memopt.checkpoint.ranks import Ranks
from memopt.checkpoint.report import Conversion, spelled
from memopt.checkpoint.stored import Record
from memopt.engines import ENGINES
from memopt.hyper import SpecError
from memopt.ledger import dtype_name
from memopt.partitions import PARTITIONS, Partition
from memopt.partitions.zero1 import Zero1
from memopt.placements.base import Home
from memopt.placements.homes import Homes
from memopt.pricing import spec_fields
from memopt.rules import RULES
from memopt.spec import OptimSpec

if TYPE_CHECKING:
    from memopt.optimizer import Optimizer

Groups = list[dict[str, Any]]
#: A parameter with its state as it is and as it will be.
Todo = list[tuple[Tensor, Slot, Slot]]
Make = Callable[[Tensor, Slot, Slot], dict[str, Tensor]]


def slots(
    optimizer: Optimizer, spec: OptimSpec, hypers: Groups, partition: Partition, homes: Homes | None = None
) -> Iterator[tuple[Tensor, Slot]]:
    """Every parameter of the optimizer as a place for state under ``spec``; ``hypers`` are its groups', ``homes`` the
    optimizer's own unless others are given."""
    homes = homes or optimizer.homes
    optimizer.settle()
    of_group = {id(group): h for group, h in zip(optimizer.param_groups, hypers, strict=True)}
    for index, (name, p, group) in enumerate(optimizer._parameters()):
        rows, total = partition.held(p), partition.total_of(p)
        yield p, Slot(spec, of_group[id(group)], name, index, rows, p.device, optimizer.seed, total,
                      dtype_name(p), homes, partition.local(p, rows, p.detach()), optimizer.capturable)  # fmt: skip


@torch.no_grad()
def convert_(optimizer: Optimizer, spec: str | OptimSpec, *, fill: Fill | None = None, **fields: Any) -> Conversion:
    """Give the optimizer another spec; its state is decoded and encoded again, parameter by parameter.

    See :meth:`memopt.Optimizer.convert_`.
    """
    fill = fill or {}
    old = optimizer.spec
    new = target_spec(old, spec, fields)
    given = dict(spec_fields(fields).get("hyper", {}))
    hypers = [target_hyper(old, new, group, given) for group in optimizer.param_groups]
    new.check_overrides([name for name, _, _ in optimizer._parameters()])
    ENGINES[new.engine].require()
    check_fill(fill, new.rule)
    partition = _partition(optimizer, new)

    homes = Homes(new, partition.rank, partition.world_size, optimizer.homes)
    before = list(slots(optimizer, old, optimizer.param_groups, optimizer.partition))
    after = [slot for _, slot in slots(optimizer, new, hypers, partition, homes)]
    report = Conversion(spelled(old), spelled(new))
    todo = [(p, here, there) for (p, here), there in zip(before, after, strict=True) if optimizer.state.get(p)]
    try:
        _check(optimizer, before, after, fill)
        change = _one_by_one if _stores_the_same(old, new, todo) else _all_or_none
        together = max(optimizer.partition.world_size, partition.world_size) > 1
        ranks = Ranks(optimizer.process_group) if together else None
        change(optimizer, new, todo, lambda *entry: _made(optimizer, entry, fill, report, ranks))
    except BaseException:
        homes.replaced_by(optimizer.homes)
        raise
    _commit(optimizer, new, hypers, partition, report)
    _move(optimizer, homes)
    if before:
        sum_over_ranks(report, partition, before[0][0].device)
    return report


def _move(optimizer: Optimizer, homes: Homes) -> None:
    """State is in these homes now."""
    optimizer.homes, left = homes, optimizer.homes
    optimizer._watch()
    optimizer._take_place()
    left.replaced_by(homes)


def _stores_the_same(old: OptimSpec, new: OptimSpec, todo: Todo) -> bool:
    """Whether only formats and places change: what is half done then is an optimizer too, and a spec can say it."""
    axes = ("rule", "master", "partition", "engine")
    same = all(getattr(old, axis) == getattr(new, axis) for axis in axes)
    same = same and all(new.options.get(k, v) == v for k, v in old.options.items())
    return same and all(
        [m.name for m, _ in moment_codes(here.spec, here.h, here.name, here.shape)]
        == [m.name for m, _ in moment_codes(there.spec, there.h, there.name, there.shape)]
        for _, here, there in todo
    )


def _one_by_one(optimizer: Optimizer, new: OptimSpec, todo: Todo, make: Make) -> None:
    """Each parameter's new state replaces its old one before the next is made."""
    old, done = optimizer.spec, []
    try:
        for p, here, there in todo:
            _replace(optimizer.state[p], make(p, here, there))
            done.append(here.name)
    except BaseException as error:
        stopped = todo[len(done)]
        optimizer.spec = mixture(old, new, done, [name for name, _, _ in optimizer._parameters()])
        now = optimizer.partition
        _move(optimizer, Homes(optimizer.spec, now.rank, now.world_size, optimizer.homes, stopped[2].homes))
        what = f"{len(done)} of {len(todo)} parameters are as {str(new)!r} keeps them and the others as {str(old)!r}"
        _say(error, stopped[1].name, f"{what}: the overrides of the spec say so, and training can go on")
        raise


def _all_or_none(optimizer: Optimizer, new: OptimSpec, todo: Todo, make: Make) -> None:
    """Old state is given up when all of the new is there: parameters of two rules are no optimizer. What comes out with
    the same bits in the same place is the old tensor, so that little is there twice."""
    made: list[tuple[Tensor, dict[str, Tensor]]] = []
    try:
        for p, here, there in todo:
            state = make(p, here, there)
            if here.spec.for_parameter(here.name)[1] == there.spec.for_parameter(there.name)[1] == "device":
                _share(optimizer.state[p], state)
            made.append((p, state))
    except BaseException as error:
        for entry in todo[: len(made)]:
            _put_back(optimizer, entry)
        _say(error, todo[len(made)][1].name, f"Nothing was changed, it is still {str(optimizer.spec)!r}")
        raise
    for p, state in made:
        _replace(optimizer.state[p], state)


def _put_back(optimizer: Optimizer, entry: tuple[Tensor, Slot, Slot]) -> None:
    """A home that knows parameters by name, and has made room for the new state, gets the old state again."""
    p, here, there = entry
    home = here.homes.of(here.name)
    if type(home) is not Home and home is there.homes.of(there.name):
        room = here.allocate()
        for key, tensor in optimizer.state[p].items():
            room[key].copy_(tensor)
        _replace(optimizer.state[p], room)


def _made(
    optimizer: Optimizer, entry: tuple[Tensor, Slot, Slot], fill: Fill, report: Conversion, ranks: Ranks | None
) -> dict[str, Tensor]:
    """The new state of one parameter, made on every rank or given up on every rank."""
    p, here, there = entry
    error, state = None, None
    try:
        state = there.allocate()
        record = _record(optimizer, here, there, optimizer.state[p])
        fill_slot(there, state, record, (here.spec, here.h), fill, report)
    except BaseException as failure:
        error = failure
    try:
        if ranks is not None:
            ranks.agree(error)
        elif error is not None:
            raise error
    except BaseException:
        if state is not None:
            _put_back(optimizer, entry)
        raise
    assert state is not None
    return state


def _record(optimizer: Optimizer, here: Slot, there: Slot, state: Mapping[str, Tensor]) -> Record:
    now = optimizer.partition
    if here.spec.partition != there.spec.partition and isinstance(now, Zero1) and now.world_size > 1:
        return record_of_all(here, state, now)
    return here.record(state)


def _replace(state: dict[str, Tensor], made: dict[str, Tensor]) -> None:
    """The step keeps its tensor, which others may hold."""
    made["step"] = state["step"].copy_(made["step"])
    state.clear()
    state.update(made)


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


def _partition(optimizer: Optimizer, new: OptimSpec) -> Partition:
    """The partition of the new spec. A rank takes some rows of the whole, or collects those of ``/zero1``; sharded
    parameters are sharded by the model, and stay."""
    now, group = optimizer.partition, optimizer.process_group
    if new.partition == optimizer.spec.partition:
        return now
    replicated = {optimizer.spec.partition, new.partition} == {"none", "zero1"}
    if now.world_size > 1 and not replicated:
        raise SpecError(f"convert_ cannot go from '/{optimizer.spec.partition}' over {now.world_size} ranks to "
                        f"'{new}': how parameters are sharded is decided before training; save and load")  # fmt: skip
    return PARTITIONS[new.partition](None if new.partition == "none" else group)  # type: ignore[call-arg]


def _check(optimizer: Optimizer, before: list[tuple[Tensor, Slot]], after: list[Slot], fill: Fill) -> None:
    """Everything that can be refused, before anything is changed."""
    kept: set[str] = set()
    for (p, here), there in zip(before, after, strict=True):
        kept |= {m.name for m, _ in moment_codes(there.spec, there.h, there.name, there.shape)}
        if optimizer.state.get(p):
            there.check(here.record(optimizer.state[p]), here.spec.rule, fill)
    unused_fill(fill, kept)


def _commit(optimizer: Optimizer, new: OptimSpec, hypers: Groups, partition: Partition, report: Conversion) -> None:
    old = RULES[optimizer.spec.rule].hyperparameters
    for group, h in zip(optimizer.param_groups, hypers, strict=True):
        for key in old.keys() - h.keys():
            group.pop(key, None)
        report.notes += _differences(group, h)
        group.update(h)
    report.notes = list(dict.fromkeys(report.notes))
    optimizer.spec = new
    optimizer.rule, optimizer.engine, optimizer.partition = RULES[new.rule], ENGINES[new.engine], partition
    optimizer.defaults = new.resolve()


def _differences(group: Mapping[str, Any], h: Mapping[str, Any]) -> list[str]:
    """One sentence for each hyperparameter that the group did not have, or had with another value."""
    return [
        f"{key} is {value!r} now" + (f", it was {group[key]!r}" if key in group else "")
        for key, value in h.items()
        if key not in group or (group[key] is not value and bool(group[key] != value))
    ]


def sum_over_ranks(report: Conversion, partition: Partition, device: torch.device) -> None:
    """Errors are of the whole state, not of this rank's rows."""
    if partition.world_size > 1 and report.losses:
        local = [[x.squared_error, x.squared] for x in report.losses.values()]
        sums = torch.tensor(local, dtype=torch.float64, device=device)
        for loss, (error, squared) in zip(report.losses.values(), partition.total(sums).tolist(), strict=True):
            loss.squared_error, loss.squared = error, squared
