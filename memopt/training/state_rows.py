"""Rows of live state: selected, appended, begun anew. What an optimizer keeps follows a weight that changes its size.

A row is one index of dimension 0. What becomes of each part of the state is in
:mod:`memopt.checkpoint.conversion.resized_rows`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.param_state import ParamState, fill_state
from memopt.checkpoint.conversion.report import Conversion
from memopt.checkpoint.conversion.resized_rows import RowChange, changed, indices
from memopt.checkpoint.state.all_rows import record_of_all
from memopt.checkpoint.state.saved import Record
from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Rows
from memopt.partitions.dtensor import is_dtensor
from memopt.partitions.zero1 import Zero1
from memopt.training.row_checks import check_shape, length, movable, param_state_of, shape_of_state, take_over

if TYPE_CHECKING:
    from memopt.optim.parts import OptimizerParts


@torch.no_grad()
def select_rows(optimizer: OptimizerParts, p: Tensor, index: Tensor | Sequence[int], into: Tensor | None) -> None:
    """See :meth:`memopt.Optimizer.select_rows`."""
    name, rows = movable(optimizer, p, into)
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
    name, before = movable(optimizer, p, into)
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
    everything = [p for _, p, _ in optimizer.params.entries()]
    given = everything if parameters is None else [parameters] if isinstance(parameters, Tensor) else list(parameters)
    plans = []
    for p in given:
        param = param_state_of(optimizer, p)
        take_over(optimizer, p)
        check_shape(optimizer, param, p)
        index = None if rows is None else indices(param.name, rows, length(param.rows.shape), p.device)
        there = {moment.name for moment, _ in param.codes}
        if chosen and not chosen <= there:
            unknown = sorted(chosen - there)[0]
            raise SpecError(f"{param.name} has no moment {unknown!r}; it has {', '.join(sorted(there)) or 'none'}")
        plans.append((p, param, index, chosen or there))
    with optimizer.integrity.changing("reset_state"):
        for p, param, index, names in plans:
            if optimizer.state.get(p):
                _reset(optimizer, p, param, index, names, step)
        optimizer.store.flush()


def _change_rows(optimizer: OptimizerParts, p: Tensor, index: Tensor, weights: Tensor, into: Tensor | None) -> None:
    shape = shape_of_state(optimizer, p)
    partition, group, after = optimizer.partition, _group_of(optimizer, p), tuple(weights.shape)
    rows = partition.rows(after, partition.rank, partition.world_size)
    state = optimizer.state.get(p)
    made: dict[str, Tensor] = {}
    if state:
        old = partition.rows(shape, partition.rank, partition.world_size)
        here = param_state_of(optimizer, p)._replace(rows=old, local=None)
        state = here.completed(state)
        there = here._replace(rows=rows, local=partition.local(p, rows, weights))
        gathered = partition.world_size > 1 and (isinstance(partition, Zero1) or is_dtensor(p))
        record = record_of_all(here, state, partition) if gathered else here.record(state)
        begins: Any = weights  # what moments that begin as the weights begin as
        if is_dtensor(weights) and any(moment.begins for moment, _ in here.codes):
            begins = begins.full_tensor()
        change = RowChange(Rows.whole(shape), Rows.whole(after), index, begins)
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
    optimizer: OptimizerParts, p: Tensor, param: ParamState, index: Tensor | None, names: set[str], step: int | None
) -> None:
    """Rows ``index`` (all for None) of these moments; what this rank has of them."""
    assert param.local is not None
    state, rows = optimizer.state[p], param.rows
    start, stop = rows.bounds
    same = torch.arange(stop - start, device=p.device)
    fresh = torch.full_like(same, -1)
    if index is not None:
        gone = index[(index >= start) & (index < stop)] - start
        fresh = same.clone()
        fresh[gone] = -1
    record = param.record(state)
    if step is not None:
        record.step = float(step)

    def change(name: str) -> RowChange:
        return RowChange(rows, rows, fresh if name in names else same, param.local)  # type: ignore[arg-type]

    _put(optimizer, p, param, param, _made(param, changed(record, param, change), param))


def _made(there: ParamState, record: Record, here: ParamState) -> dict[str, Tensor]:
    """The state of ``there`` in plain memory."""
    state = {
        line.key: torch.zeros(line.shape, dtype=getattr(torch, line.dtype), device=there.device)
        for line in there.lines()
    }
    fill_state(there, state, record, (here.spec, here.h), {}, Conversion("", ""))
    return state


def _put(optimizer: OptimizerParts, p: Tensor, here: ParamState, there: ParamState, made: dict[str, Tensor]) -> None:
    """Where the placement says; the count of steps keeps its tensor, and keys of the user's own stay."""
    state = optimizer.state[p]
    before = {line.key for line in here.lines()}
    room = there.allocate()
    for key, tensor in made.items():
        room[key].copy_(tensor)
    own = {key: value for key, value in state.items() if key not in room and key not in before}
    room["step"] = state["step"].copy_(room["step"])
    optimizer.state[p] = {**room, **own}
