"""Rows of live state: selected, appended, begun anew. What an optimizer keeps follows a weight that changes its size.

A row is one index of dimension 0. What becomes of each part of the state is in
:mod:`memopt.checkpoint.conversion.resized_rows`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.in_place import slots
from memopt.checkpoint.conversion.param_state import Slot, fill_slot
from memopt.checkpoint.conversion.report import Conversion
from memopt.checkpoint.conversion.resized_rows import Change, changed, indices
from memopt.checkpoint.state.all_rows import record_of_all
from memopt.checkpoint.state.saved import Record
from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Rows
from memopt.layout.replaced_state import is_own
from memopt.partitions.dtensor import is_dtensor
from memopt.partitions.zero1 import Zero1

if TYPE_CHECKING:
    from memopt.optim.parts import OptimizerParts


@torch.no_grad()
def select_rows(optimizer: OptimizerParts, p: Tensor, index: Tensor | Sequence[int], into: Tensor | None) -> None:
    """See :meth:`memopt.Optimizer.select_rows`."""
    name, rows = _movable(optimizer, p, into)
    wanted = indices(name, index, rows, p.device)
    now, there = len(p), "into" if into is not None else "it"
    if into is None and now == rows:
        weights = p.detach()[wanted]
    else:
        weights = (p if into is None else into).detach()
        if len(weights) != len(wanted):
            raise ValueError(f"{name} has state of {rows} rows, of which {len(wanted)} are selected; {there} has {now}")
    _change_rows(optimizer, p, wanted, weights, into)


@torch.no_grad()
def append_rows(optimizer: OptimizerParts, p: Tensor, rows: Tensor | None, into: Tensor | None) -> None:
    """See :meth:`memopt.Optimizer.append_rows`."""
    name, before = _movable(optimizer, p, into)
    if rows is not None:
        if len(p) != before or into is not None:
            raise ValueError(f"{name}: give either rows or a weight that has them already, not both")
        if rows.dim() != p.dim() or rows.shape[1:] != p.shape[1:]:
            raise ValueError(f"{name}: rows are of shape {tuple(rows.shape)}, those of the weight {tuple(p.shape)}")
        weights = torch.cat([p.detach(), rows.to(p.device, p.dtype)])
    else:
        weights = (p if into is None else into).detach()
        if not optimizer.state.get(p) and into is None:
            return  # it is made at the first step, for the weight as it is then
        if len(weights) == before and not _has_rows(optimizer.state[p]) and into is None:
            return  # nothing but a number of steps: what had fewer rows is nowhere
        if len(weights) <= before:
            raise ValueError(f"{name} has {len(weights)} rows and state of {before}: there is none to append")
    index = torch.full((len(weights),), -1, device=p.device)
    index[:before] = torch.arange(before, device=p.device)
    _change_rows(optimizer, p, index, weights, into)


def _has_rows(state: Mapping[str, Any]) -> bool:
    return any(isinstance(x, Tensor) and x.dim() > 0 for x in state.values())


@torch.no_grad()
def reset_state(
    optimizer: OptimizerParts,
    parameters: Tensor | Iterable[Tensor] | None,
    moments: str | Iterable[str] | None,
    rows: Tensor | Sequence[int] | None,
    step: int | None,
) -> None:
    """See :meth:`memopt.Optimizer.reset_state`."""
    if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
        raise SpecError(f"step={step!r} is not allowed; it is a number of steps, or None")
    chosen = None if moments is None else {moments} if isinstance(moments, str) else set(moments)
    known = [p for _, p, _ in optimizer.params.entries()]
    given = known if parameters is None else [parameters] if isinstance(parameters, Tensor) else list(parameters)
    plans = []
    for p in given:
        slot = _slot(optimizer, p)
        _take_over(optimizer, p)
        _check_shape(optimizer, slot, p)
        index = None if rows is None else indices(slot.name, rows, _length(slot.rows.shape), p.device)
        kept = {moment.name for moment, _ in slot.codes}
        if chosen and not chosen <= kept:
            unknown = sorted(chosen - kept)[0]
            raise SpecError(f"{slot.name} has no moment {unknown!r}; it has {', '.join(sorted(kept)) or 'none'}")
        plans.append((p, slot, index, chosen or kept))
    with optimizer.integrity.changing("reset_state"):
        for p, slot, index, names in plans:
            if optimizer.state.get(p):
                _reset(optimizer, p, slot, index, names, step)
        optimizer.store.flush()


# What is asked for -----------------------------------------------------------------------------------------------


def _slot(optimizer: OptimizerParts, p: Tensor) -> Slot:
    optimizer.setup.check_whole()
    optimizer.placement_stores.check()
    for q, slot in slots(optimizer, optimizer.spec, optimizer.param_groups, optimizer.partition):
        if q is p:
            return slot
    shape = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
    raise ValueError(f"a parameter of shape {shape} is not one of this optimizer's")


def _movable(optimizer: OptimizerParts, p: Tensor, into: Tensor | None) -> tuple[str, int]:
    """Its name, and how many rows its state has; raises where they cannot change."""
    name = _slot(optimizer, p).name
    if optimizer.partition.is_flattened:
        raise RuntimeError(
            f"DeepSpeed has flattened {name}, and its rows are where it was cut: save, change the model, and use "
            "memopt.load(..., strict=False), which takes the rows that are in both"
        )
    if is_dtensor(p) or is_dtensor(into):
        _check_sharded(optimizer, name, p, into)
    if optimizer.release is not None:
        raise RuntimeError(f"{name} is stepped inside backward(), by hooks that know its size: release.remove() first")
    if p.dim() == 0:
        raise ValueError(f"{name} is a single number and has no rows")
    _take_over(optimizer, p)
    if into is None:
        return name, _shape_of_state(optimizer, p)[0]
    if into.dtype != p.dtype or into.device != p.device or into.shape[1:] != p.shape[1:] or into.dim() != p.dim():
        raise ValueError(
            f"into is {into.dtype} {tuple(into.shape)} on {into.device}; in the place of {name} goes {p.dtype} "
            f"{('n', *p.shape[1:])} on {p.device}"
        )
    if not into.is_leaf or any(into is q for _, q, _ in optimizer.params.entries()):
        raise ValueError(f"into is {'no leaf' if not into.is_leaf else 'a parameter of this optimizer already'}")
    return name, _shape_of_state(optimizer, p)[0]


def _check_sharded(optimizer: OptimizerParts, name: str, p: Tensor, into: Tensor | None) -> None:
    """Raise RuntimeError for a parameter that torch has sharded, but where another takes its place that is cut by rows
    over the same ranks."""
    partition = optimizer.partition
    for x in (p, into):
        if x is None or not is_dtensor(x):
            raise RuntimeError(
                f"torch has sharded {name}, which cannot change its size where it is: make the model anew, shard it, "
                "and give the weight that takes its place as into=. Or save, and use memopt.load(..., strict=False), "
                "which takes the rows that are in both"
            )
        if partition.local_rows(x) != partition.rows(tuple(x.shape), partition.rank, partition.world_size):
            raise RuntimeError(
                f"{name} is not cut by rows over all ranks; save, and use memopt.load(..., strict=False)"
            )


def _take_over(optimizer: OptimizerParts, p: Tensor) -> None:
    """What somebody else has put into its state is taken over first, as before a step. A weight that has another size
    than its state by now is held against the layout of that size later."""
    for one in optimizer.params.resolved():
        if one.p is p and optimizer.state.get(p):
            with suppress(RuntimeError):
                optimizer.store.check(one, optimizer.partition.local(p, one.layout.rows, p.detach()))


def _shape_of_state(optimizer: OptimizerParts, p: Tensor) -> tuple[int, ...]:
    """The shape for which its state was made; its data may be of another by now. That of the weight where there is no
    state, or where no number of rows fits it."""
    state, shape = optimizer.state.get(p), tuple(p.shape)
    if not state or not shape:
        return shape
    slot, partition = _slot(optimizer, p), optimizer.partition
    rule = slot.rule
    there = {
        k: tuple(x.shape) for k, x in state.items() if isinstance(x, Tensor) and k != "step" and not is_own(rule, k)
    }
    made = [m.shape[0] for m in optimizer.params.made if m.parameter() is p and m.shape[1:] == shape[1:]]
    lengths = [x.shape[0] for x in state.values() if isinstance(x, Tensor) and x.dim()]
    halves = [2 * n - odd for n in lengths for odd in (0, 1)] if len(shape) == 1 else []  # two codes in a byte
    for rows in dict.fromkeys([*made, shape[0], *lengths, *halves]):
        tried = rows, *shape[1:]
        here = slot._replace(rows=partition.rows(tried, partition.rank, partition.world_size))
        lines = [line for line in here.lines() if line.key in there]
        if (lines or not there) and all(there[line.key] == line.shape for line in lines):
            return tried
    return shape


def _check_shape(optimizer: OptimizerParts, slot: Slot, p: Tensor) -> None:
    shape = _shape_of_state(optimizer, p)
    if shape != tuple(p.shape):
        raise RuntimeError(
            f"{slot.name} is {tuple(p.shape)} and its state {shape}: call opt.append_rows or opt.select_rows first"
        )


def _length(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


# What is done ----------------------------------------------------------------------------------------------------


def _change_rows(optimizer: OptimizerParts, p: Tensor, index: Tensor, weights: Tensor, into: Tensor | None) -> None:
    shape = _shape_of_state(optimizer, p)
    partition, group, after = optimizer.partition, _group_of(optimizer, p), tuple(weights.shape)
    rows = partition.rows(after, partition.rank, partition.world_size)
    state = optimizer.state.get(p)
    made: dict[str, Tensor] = {}
    if state:
        old = partition.rows(shape, partition.rank, partition.world_size)
        here = _slot(optimizer, p)._replace(rows=old, parameter=None)
        state = here.completed(state)
        there = here._replace(rows=rows, parameter=partition.local(p, rows, weights))
        gathered = partition.world_size > 1 and (isinstance(partition, Zero1) or is_dtensor(p))
        record = record_of_all(here, state, partition) if gathered else here.record(state)
        begins: Any = weights  # what moments that begin as the weights begin as
        if is_dtensor(weights) and any(moment.begins for moment, _ in here.codes):
            begins = begins.full_tensor()
        change = Change(Rows.whole(shape), Rows.whole(after), index, begins)
        made = _made(there, changed(record, there, lambda name: change), here)
    old_data, old_grad, target = p.data, p.grad, p if into is None else into
    with optimizer.integrity.changing("a change of rows"):
        try:
            p.grad = None
            if into is None:
                _set_data(p, weights.contiguous())
            else:
                group["params"][next(i for i, q in enumerate(group["params"]) if q is p)] = into
            optimizer.params.remember()
            if state:
                _put(optimizer, p, here, there, made)
                if into is not None:
                    optimizer.state[target] = optimizer.state.pop(p)
        except BaseException:
            if into is None:
                _set_data(p, old_data)
                p.grad = old_grad
            else:
                group["params"][next(i for i, q in enumerate(group["params"]) if q is into)] = p
            optimizer.params.remember()
            raise
        optimizer.store.register_params()
        optimizer.store.flush()


def _set_data(p: Tensor, data: Tensor) -> None:
    """``p.data = data``, and autograd forgets how large ``p`` was. It keeps the node that adds gradients up, with the
    size, while any graph is alive (a loss that is still in a variable, say), but makes a new one for another dtype."""
    p.data = p.data.new_empty(0, dtype=torch.float32 if p.dtype == torch.float64 else torch.float64)
    p.data = data


def _group_of(optimizer: OptimizerParts, p: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))


def _reset(
    optimizer: OptimizerParts, p: Tensor, slot: Slot, index: Tensor | None, names: set[str], step: int | None
) -> None:
    """Rows ``index`` (all for None) of these moments; what this rank has of them."""
    assert slot.parameter is not None
    state, rows = optimizer.state[p], slot.rows
    start, stop = rows.bounds
    same = torch.arange(stop - start, device=p.device)
    fresh = torch.full_like(same, -1)
    if index is not None:
        gone = index[(index >= start) & (index < stop)] - start
        fresh = same.clone()
        fresh[gone] = -1
    record = slot.record(state)
    if step is not None:
        record.step = float(step)

    def change(name: str) -> Change:
        return Change(rows, rows, fresh if name in names else same, slot.parameter)  # type: ignore[arg-type]

    _put(optimizer, p, slot, slot, _made(slot, changed(record, slot, change), slot))


def _made(there: Slot, record: Record, here: Slot) -> dict[str, Tensor]:
    """The state of ``there`` in plain memory."""
    state = {
        line.key: torch.zeros(line.shape, dtype=getattr(torch, line.dtype), device=there.device)
        for line in there.lines()
    }
    fill_slot(there, state, record, (here.spec, here.h), {}, Conversion("", ""))
    return state


def _put(optimizer: OptimizerParts, p: Tensor, here: Slot, there: Slot, made: dict[str, Tensor]) -> None:
    """Where the placement says; the count of steps keeps its tensor, and keys of the user's own stay."""
    state = optimizer.state[p]
    before = {line.key for line in here.lines()}
    room = there.allocate()
    for key, tensor in made.items():
        room[key].copy_(tensor)
    own = {key: value for key, value in state.items() if key not in room and key not in before}
    room["step"] = state["step"].copy_(room["step"])
    optimizer.state[p] = {**room, **own}
