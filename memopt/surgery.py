"""Rows of live state: selected, appended, begun anew. What an optimizer keeps follows a weight that changes its size.

A row is one index of dimension 0. State lies along rows in every format (blocks never straddle them), so that rows
which stay are copied part by part, codes bit for bit, and only the rest is made:

* codes, scales, 16- and 32-bit moments, means of rows, what a master keeps: the rows that are asked for; a new row is
  zeros, which every format reads as zero and every master as the weight itself;
* a factored matrix: its rows' means likewise. The means of its columns become those of the rows that remain, of the
  matrix that the factors stand for: col <- col * mean(row of now) / mean(row of before);
* slow weights (lookahead): a new row begins as the weights, as at the first step;
* vectors of which a block is coded, and parameters that change between coded and 32 bits because they cross the size
  under which nothing is coded: decoded and encoded, since no row of them stays whole.

The count of steps is the parameter's, not a row's, and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memopt.checkpoint.convert import slots
from memopt.checkpoint.everyone import record_of_all
from memopt.checkpoint.fit import Slot, fill_slot
from memopt.checkpoint.flat import FlatBlocks
from memopt.checkpoint.kept import kept_of
from memopt.checkpoint.report import Conversion
from memopt.checkpoint.stored import LivePiece, Record, Stored
from memopt.formats import FORMATS, Format
from memopt.formats.base import Parts
from memopt.geometry import Rows, row_count
from memopt.hyper import SpecError
from memopt.partitions.dtensor import is_dtensor
from memopt.partitions.zero1 import Zero1

if TYPE_CHECKING:
    from memopt.optimizer import Optimizer


class Change(NamedTuple):
    """``index`` int64 [n]: which of the rows (of a vector, elements) ``before`` each of those ``after`` is; -1 is a new
    one. ``weights`` are those after, of which a moment that begins as the parameter is made."""

    before: Rows
    after: Rows
    index: Tensor  # type: ignore[assignment]
    weights: Tensor


@torch.no_grad()
def select_rows(optimizer: Optimizer, p: Tensor, index: Tensor | Sequence[int], into: Tensor | None) -> None:
    """See :meth:`memopt.Optimizer.select_rows`."""
    name, rows = _movable(optimizer, p, into)
    wanted = _indices(name, index, rows, p.device)
    now, there = len(p), "into" if into is not None else "it"
    if into is None and now == rows:
        weights = p.detach()[wanted]
    else:
        weights = (p if into is None else into).detach()
        if len(weights) != len(wanted):
            raise ValueError(f"{name} has state of {rows} rows, of which {len(wanted)} are selected; {there} has {now}")
    _change_rows(optimizer, p, wanted, weights, into)


@torch.no_grad()
def append_rows(optimizer: Optimizer, p: Tensor, rows: Tensor | None, into: Tensor | None) -> None:
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
        if len(weights) <= before:
            raise ValueError(f"{name} has {len(weights)} rows and state of {before}: there is none to append")
    index = torch.full((len(weights),), -1, device=p.device)
    index[:before] = torch.arange(before, device=p.device)
    _change_rows(optimizer, p, index, weights, into)


@torch.no_grad()
def reset_state(
    optimizer: Optimizer,
    parameters: Tensor | Iterable[Tensor] | None,
    moments: str | Iterable[str] | None,
    rows: Tensor | Sequence[int] | None,
    step: int | None,
) -> None:
    """See :meth:`memopt.Optimizer.reset_state`."""
    if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
        raise SpecError(f"step={step!r} is not allowed; it is a number of steps, or None")
    chosen = None if moments is None else {moments} if isinstance(moments, str) else set(moments)
    known = [p for _, p, _ in optimizer._parameters()]
    given = known if parameters is None else [parameters] if isinstance(parameters, Tensor) else list(parameters)
    plans = []
    for p in given:
        slot = _slot(optimizer, p)
        _check_shape(optimizer, slot, p)
        index = None if rows is None else _indices(slot.name, rows, _length(slot.rows.shape), p.device)
        kept = {moment.name for moment, _ in slot.codes}
        if chosen and not chosen <= kept:
            unknown = sorted(chosen - kept)[0]
            raise SpecError(f"{slot.name} has no moment {unknown!r}; it has {', '.join(sorted(kept)) or 'none'}")
        plans.append((p, slot, index, chosen or kept))
    for p, slot, index, names in plans:
        if optimizer.state.get(p):
            _reset(optimizer, p, slot, index, names, step)
    optimizer._take_place()


# What is asked for -----------------------------------------------------------------------------------------------


def _slot(optimizer: Optimizer, p: Tensor) -> Slot:
    optimizer._check_finished()
    optimizer.homes.check()
    for q, slot in slots(optimizer, optimizer.spec, optimizer.param_groups, optimizer.partition):
        if q is p:
            return slot
    shape = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
    raise ValueError(f"a parameter of shape {shape} is not one of this optimizer's")


def _movable(optimizer: Optimizer, p: Tensor, into: Tensor | None) -> tuple[str, int]:
    """Its name, and how many rows its state has; raises where they cannot change."""
    name = _slot(optimizer, p).name
    if optimizer.partition.is_flattened or is_dtensor(p):
        who = "DeepSpeed has flattened" if optimizer.partition.is_flattened else "torch has sharded"
        raise RuntimeError(
            f"{who} {name}, and its rows are where it was cut: save, change the model, shard it anew and use "
            "memopt.load(..., strict=False), which takes the rows that are in both"
        )
    if optimizer.release is not None:
        raise RuntimeError(f"{name} is stepped inside backward(), by hooks that know its size: release.remove() first")
    if p.dim() == 0:
        raise ValueError(f"{name} is a single number and has no rows")
    if into is None:
        return name, _shape_of_state(optimizer, p)[0]
    if into.dtype != p.dtype or into.device != p.device or into.shape[1:] != p.shape[1:] or into.dim() != p.dim():
        raise ValueError(
            f"into is {into.dtype} {tuple(into.shape)} on {into.device}; in the place of {name} goes {p.dtype} "
            f"{('n', *p.shape[1:])} on {p.device}"
        )
    if not into.is_leaf or any(into is q for _, q, _ in optimizer._parameters()):
        raise ValueError(f"into is {'no leaf' if not into.is_leaf else 'a parameter of this optimizer already'}")
    return name, _shape_of_state(optimizer, p)[0]


def _shape_of_state(optimizer: Optimizer, p: Tensor) -> tuple[int, ...]:
    """The shape for which its state was made; its data may be of another by now."""
    made = [m.shape for m in optimizer._made_for if m.parameter() is p]
    return made[0] if made else tuple(p.shape)


def _check_shape(optimizer: Optimizer, slot: Slot, p: Tensor) -> None:
    shape = _shape_of_state(optimizer, p)
    if shape != tuple(p.shape):
        raise RuntimeError(
            f"{slot.name} is {tuple(p.shape)} and its state {shape}: call opt.append_rows or opt.select_rows first"
        )


def _indices(name: str, index: Tensor | Sequence[int], rows: int, device: torch.device) -> Tensor:
    """int64 [n] of an index or a mask [rows]."""
    wanted = torch.as_tensor(index, device=device)
    if wanted.dtype == torch.bool and wanted.shape == (rows,):
        return wanted.nonzero().view(-1)
    if not wanted.numel() and wanted.dim() == 1:
        return wanted.long()
    if wanted.dim() != 1 or wanted.is_floating_point() or wanted.is_complex() or wanted.dtype == torch.bool:
        raise ValueError(
            f"{name}: an index is a vector of integers or a mask of {rows}; got {wanted.dtype} {tuple(wanted.shape)}"
        )
    low, high = int(wanted.min()), int(wanted.max())
    if low < 0 or high >= rows:
        raise IndexError(f"{name} has rows 0 to {rows - 1}; the index has {low if low < 0 else high}")
    return wanted.long()


def _length(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


# What is done ----------------------------------------------------------------------------------------------------


def _change_rows(optimizer: Optimizer, p: Tensor, index: Tensor, weights: Tensor, into: Tensor | None) -> None:
    shape = _shape_of_state(optimizer, p)
    partition, group, after = optimizer.partition, _group_of(optimizer, p), tuple(weights.shape)
    rows = partition.rows(after, partition.rank, partition.world_size)
    state = optimizer.state.get(p)
    made: dict[str, Tensor] = {}
    if state:
        old = partition.rows(shape, partition.rank, partition.world_size)
        here = _slot(optimizer, p)._replace(rows=old, parameter=None)
        there = here._replace(rows=rows, parameter=partition.local(p, rows, weights))
        gathered = isinstance(partition, Zero1) and partition.world_size > 1
        record = record_of_all(here, state, partition) if gathered else here.record(state)  # type: ignore[arg-type]
        change = Change(Rows.whole(shape), Rows.whole(after), index, weights)
        made = _made(there, changed(record, there, lambda name: change), here)
    old_data, old_grad, target = p.data, p.grad, p if into is None else into
    try:
        p.grad = None
        if into is None:
            p.data = weights.contiguous()
        else:
            group["params"][next(i for i, q in enumerate(group["params"]) if q is p)] = into
        optimizer._remember()
        if state:
            _put(optimizer, p, here, there, made)
            if into is not None:
                optimizer.state[target] = optimizer.state.pop(p)
    except BaseException:
        if into is None:
            p.data, p.grad = old_data, old_grad
        else:
            group["params"][next(i for i, q in enumerate(group["params"]) if q is into)] = p
        optimizer._remember()
        raise
    optimizer._watch()
    optimizer._take_place()


def _group_of(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))


def _reset(
    optimizer: Optimizer, p: Tensor, slot: Slot, index: Tensor | None, names: set[str], step: int | None
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


def changed(record: Record, there: Slot, change_of: Callable[[str], Change]) -> Record:
    """The record with rows as ``change_of(moment)`` says (of an empty name, for what a master keeps); ``there`` is the
    place it goes to."""
    formats = {moment.name: fmt for moment, fmt in there.codes}
    begin = {moment.name for moment, _ in there.codes if moment.begins}
    moments = {}
    for name, stored in record.moments.items():
        change = change_of(name)
        parts = _parts(stored, change, there) if stored.format is formats.get(name) else None
        fmt = stored.format
        if parts is None:
            x = stored.decode(change.before)
            fmt, parts = FORMATS["32bit"], {"": _rows_of(x, change.index)}
        if name in begin:
            new = (change.index < 0).to(parts[""].device)
            parts[""][new] = change.weights[change.index < 0].to(parts[""])
        piece = LivePiece(change.after, parts)
        moments[name] = Stored(stored.moment, fmt, change.after.shape, (piece,))
    change, kept = change_of(""), record.kept
    if kept is not None:
        beside = _rows_of(kept.stored.part("", change.before), change.index)
        piece = LivePiece(change.after, {"": beside})
        kept = kept_of(kept.master.name, kept.dtype, change.after.shape, (piece,), None)
    return Record(record.name, change.after.shape, record.step, moments, dtype=record.dtype, kept=kept)


def _parts(stored: Stored, change: Change, there: Slot) -> Parts | None:
    """The parts of these rows without decoding them, or None where a row of the parameter is none of the parts."""
    before, moment, fmt = change.before, stored.moment, stored.format
    if fmt.name == "factored" and len(before.shape) == 2:
        return _factors(stored, change, there)
    if not _along_rows(fmt, stored, before):
        return None
    return {part: _rows_of(stored.part(part, before), change.index) for part in fmt.layout(moment, before)}


def _along_rows(fmt: Format, stored: Stored, rows: Rows) -> bool:
    """Whether index i of dimension 0 of every part is that of the parameter."""
    layout = fmt.layout(stored.moment, rows)
    if len(rows.shape) < 2:
        return [part.shape for part in layout.values()] == [rows.local_shape]
    one = fmt.layout(stored.moment, rows._replace(stop=rows.first + min(rows.count, 1)))
    return not isinstance(fmt, FlatBlocks) and all(
        tensor.shape[0] == rows.count and one[part].shape[0] == min(rows.count, 1) for part, tensor in layout.items()
    )


def _factors(stored: Stored, change: Change, there: Slot) -> Parts:
    row, col = stored.part("row", change.before), stored.part("col", change.before)
    new = _rows_of(row, change.index)
    sums = torch.stack([row.double().sum(), new.double().sum()])
    if change.before == there.rows:  # these are this rank's alone
        sums = there.total(sums)
    counts = [max(row_count(rows.shape), 1) for rows in (change.before, change.after)]
    mean = sums / sums.new_tensor(counts)
    return {"row": new, "col": (col * (mean[1] / mean[0])).float() if mean[0] else torch.zeros_like(col)}


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    """These rows of ``x``, a new tensor; zeros for -1. Bytes for what torch cannot index."""
    bits = x.view(torch.uint8) if x.is_floating_point() and x.itemsize == 1 else x
    bits, index = bits.reshape(1) if not bits.dim() else bits, index.to(x.device)
    if len(bits):
        found = bits.index_select(0, index.clamp(min=0))
        found[index < 0] = 0
    else:
        found = bits.new_zeros(len(index), *bits.shape[1:])
    return found.view(x.dtype).reshape(x.shape if not x.dim() else found.shape)


def _made(there: Slot, record: Record, here: Slot) -> dict[str, Tensor]:
    """The state of ``there`` in plain memory."""
    state = {
        line.key: torch.zeros(line.shape, dtype=getattr(torch, line.dtype), device=there.device)
        for line in there.lines()
    }
    fill_slot(there, state, record, (here.spec, here.h), {}, Conversion("", ""))
    return state


def _put(optimizer: Optimizer, p: Tensor, here: Slot, there: Slot, made: dict[str, Tensor]) -> None:
    """Where the placement says; the count of steps keeps its tensor, and keys of the user's own stay."""
    state = optimizer.state[p]
    before = {line.key for line in here.lines()}
    room = there.allocate()
    for key, tensor in made.items():
        room[key].copy_(tensor)
    own = {key: value for key, value in state.items() if key not in room and key not in before}
    room["step"] = state["step"].copy_(room["step"])
    optimizer.state[p] = {**room, **own}
