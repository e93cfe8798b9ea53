"""``memopt.load(..., strict=False)``: what is in both, the checkpoint and what it goes into; the rest is named.

Parameters are matched by name. One that was not saved begins at zero, as before its first step; what was saved and is
not here is left. Of a weight with more or fewer rows than it was saved with, the rows that both have are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.param_state import ParamState
from memopt.checkpoint.conversion.resized_rows import RowChange, changed
from memopt.checkpoint.state.saved import Record, SavedGroup, Source
from memopt.core.param_names import matching
from memopt.core.rows import Rows, Shape
from memopt.optim.edits.group_checks import is_named
from memopt.partitions.dtensor import is_dtensor

if TYPE_CHECKING:
    from memopt.optim.parts import OptimizerParts

#: Names in one note.
SHOWN = 5


def records(source: Source, optimizer: OptimizerParts) -> list[Record]:
    """The record of each parameter, one of no steps for those that were not saved. Raises ValueError without names."""
    if not (source.named and is_named(optimizer.param_groups)):
        who = source.origin if not source.named else "the optimizer"
        raise ValueError(f"strict=False matches parameters by name, and {who} has numbers only")
    here = list(optimizer.params.entries())
    theirs, ours = matching(list(source.records), [name for name, _, _ in here])
    by_name = dict(zip(theirs, source.records.values(), strict=True))
    return [
        by_name.get(name) or Record(name, tuple(p.shape), stepped=False)
        for name, (_, p, _) in zip(ours, here, strict=True)
    ]


def groups(source: Source, optimizer: OptimizerParts, found: list[Record]) -> list[SavedGroup | None]:
    """For each of the optimizer's groups, one in which those of its parameters were that were saved; None if there are
    none, or if they were saved with different hyperparameters. ``found`` are the records of :func:`records`."""
    of_name = {name: group for group in source.groups for name in group.names}
    rest, chosen = iter(found), list[SavedGroup | None]()
    for group in optimizer.param_groups:
        names = [next(rest).name for _ in group["params"]]
        theirs = [of_name[name] for name in names if name in of_name]
        same = bool(theirs) and all(one.hyper == theirs[0].hyper for one in theirs)
        chosen.append(theirs[0] if same else None)
    return chosen


def resized(record: Record, param: ParamState, p: Tensor) -> Record:
    """The record in the shape of the parameter: the rows that both have, zeros for the others. One of no steps where
    they have no rows in common."""
    shape, saved = param.shape, record.shape
    if not record.stepped or saved == shape:
        return record
    if not alike(saved, shape):
        return Record(record.name, shape, stepped=False)
    index = torch.arange(shape[0])
    index[saved[0] :] = -1
    weights = p.detach()
    moments = dict(record.moments)
    if is_dtensor(p):  # whose new rows are not all here: what stands for the weights begins as they are
        begin = {moment.name for moment, _ in param.codes if moment.begins}
        moments = {name: stored for name, stored in moments.items() if name not in begin}
        weights = torch.empty(0)
    change = RowChange(Rows.whole(saved), Rows.whole(shape), index, weights)
    record.moments = moments
    return changed(record, param, lambda name: change)


def alike(saved: Shape, here: Shape) -> bool:
    """Whether two tensors differ in their number of rows alone."""
    return len(saved) == len(here) > 0 and saved[1:] == here[1:]


def notes(what: str, saved: Mapping[str, Any], here: Mapping[str, Any], begins: str) -> list[str]:
    """What was taken, what was not (in the words ``begins``) and what was left, of tensors with their shapes."""
    taken = [name for name in here if name in saved and saved[name] == here[name]]
    rows = [name for name in here if name in saved and saved[name] != here[name] and alike(saved[name], here[name])]
    new = [name for name in here if name not in taken and name not in rows]
    left = [name for name in saved if name not in taken and name not in rows]
    found = [f"{what}: {len(taken)} tensors as they were saved"]
    for name in rows:
        a, b = saved[name][0], here[name][0]
        rest = f"{begins}: rows {a} to {b - 1}" if b > a else f"left: rows {b} to {a - 1}"
        found.append(f"{what}: {name} has {b} rows, {a} were saved; {rest}")
    if new:
        found.append(f"{what}: {begins}: {_shown(new)}")
    if left:
        found.append(f"{what}: left: {_shown(left)}")
    return found


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
