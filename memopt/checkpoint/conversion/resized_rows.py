"""The state of one parameter for other rows than it was kept for: selected, appended, begun anew.

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

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memopt.checkpoint.conversion.master_weights import saved_master
from memopt.checkpoint.conversion.param_state import ParamState
from memopt.checkpoint.state.saved import LivePiece, Record, Stored
from memopt.core.rows import Rows
from memopt.formats import FORMATS, Format
from memopt.formats.base import Parts
from memopt.formats.foreign.flat_blocks import FlatBlocks


class RowChange(NamedTuple):
    """``index`` int64 [n]: which of the rows (of a vector, elements) ``before`` each of those ``after`` is; -1 is a new
    one. ``weights`` are those after, of which a moment that begins as the parameter is made."""

    before: Rows
    after: Rows
    index: Tensor  # type: ignore[assignment]
    weights: Tensor


def changed(record: Record, there: ParamState, change_of: Callable[[str], RowChange]) -> Record:
    """The record with rows as ``change_of(moment)`` says (of an empty name, for what a master keeps); ``there`` is the
    place it goes to."""
    formats = {moment.name: fmt for moment, fmt in there.codes}
    begin = {moment.name for moment, _ in there.codes if moment.begins}
    moments = {}
    for name, stored in record.moments.items():
        change = change_of(name)
        if stored.format.own_shape:
            piece = LivePiece(change.after, _of_the_whole(record.name, stored, change))
            moments[name] = Stored(stored.moment, stored.format, change.after.shape, (piece,))
            continue
        parts = _parts(stored, change, there) if stored.format is formats.get(name) else None
        fmt = stored.format
        if parts is None:
            x = stored.decode(change.before)
            fmt, parts = FORMATS["32bit"], {"": _rows_of(x, change.index)}
        new = change.index < 0
        if name in begin and bool(new.any()):
            values, weights = (x if x.dim() else x.view(1) for x in (parts[""], change.weights))
            values[new.to(values.device)] = weights[new].to(values)
        piece = LivePiece(change.after, parts)
        moments[name] = Stored(stored.moment, fmt, change.after.shape, (piece,))
    change, master = change_of(""), record.master
    if master is not None:
        beside = _rows_of(master.stored.part("", change.before), change.index)
        piece = LivePiece(change.after, {"": beside})
        master = saved_master(master.master.name, master.dtype, change.after.shape, (piece,), None)
    return Record(record.name, change.after.shape, record.step, moments, dtype=record.dtype, master=master)


def _of_the_whole(name: str, stored: Stored, change: RowChange) -> Parts:
    """The parts of a moment that is of no rows: zeros where all rows are new, the same where all stay as they are.
    ValueError for anything else."""
    fmt, moment, rows = stored.format, stored.moment, change.before
    if bool((change.index < 0).all()):
        layout = fmt.layout(moment, change.after)
        device = change.weights.device
        return {part: torch.zeros(x.shape, dtype=getattr(torch, x.dtype), device=device) for part, x in layout.items()}
    places = torch.arange(rows.bounds[1] - rows.bounds[0], device=change.index.device)
    if torch.equal(places, change.index):
        return {part: stored.part(part, rows) for part in fmt.layout(moment, rows)}
    raise ValueError(
        f"{name}: {moment.name} is of a projection of the whole matrix, or one number for it, and has no rows that "
        "could be taken along; without its state (opt.state.pop(parameter)) the weight may change its size"
    )


def _parts(stored: Stored, change: RowChange, there: ParamState) -> Parts | None:
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
    if len(rows.shape) < 2 or rows.unit > 1:
        return [part.shape for part in layout.values()] == [rows.local_shape]
    one = fmt.layout(stored.moment, rows._replace(stop=rows.first + min(rows.count, 1)))
    return not isinstance(fmt, FlatBlocks) and all(
        tensor.shape[0] == rows.count and one[part].shape[0] == min(rows.count, 1) for part, tensor in layout.items()
    )


def _factors(stored: Stored, change: RowChange, there: ParamState) -> Parts:
    row, col = stored.part("row", change.before), stored.part("col", change.before)
    new = _rows_of(row, change.index)
    sums = torch.stack([row.double().sum(), new.double().sum()])
    if change.before == there.rows:  # these are this rank's alone
        sums = there.total(sums)
    counts = [max(rows.shape[0], 1) for rows in (change.before, change.after)]
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


def indices(name: str, index: Tensor | Sequence[int], rows: int, device: torch.device) -> Tensor:
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
