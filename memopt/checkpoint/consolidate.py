"""The state of all ranks of ``/zero1`` in one dictionary, as one process would have it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.in_place import param_states
from memopt.checkpoint.conversion.param_state import ParamState
from memopt.checkpoint.state.all_rows import record_of_all
from memopt.checkpoint.state.saved import Record
from memopt.core.rows import Rows
from memopt.layout.replaced_state import own_entries
from memopt.partitions.zero1 import Zero1

if TYPE_CHECKING:
    from memopt.optim.parts import OptimizerParts


@torch.no_grad()
def consolidated(optimizer: OptimizerParts, to: int | None) -> dict[int, dict[str, Any]] | None:
    """The state of every parameter, by its number, in host memory of rank ``to`` (None: of every rank); None elsewhere.

    Every rank must call this. One parameter's state is on its way at a time.
    """
    partition = optimizer.partition
    assert isinstance(partition, Zero1)
    here = to in (None, partition.rank)
    found: dict[int, dict[str, Any]] = {}
    for p, param in param_states(optimizer, optimizer.spec, optimizer.param_groups, partition):
        state = optimizer.state.get(p)
        if state:
            own = own_entries(param.rule, state)
            record = record_of_all(param, {key: x for key, x in state.items() if key not in own}, partition)
            if here:
                found[param.index] = {**_whole(param, state, record), **copy.deepcopy(own)}
    return found if here else None


def _whole(param: ParamState, state: Mapping[str, Tensor], record: Record) -> dict[str, Tensor]:
    rows = Rows.whole(param.shape)
    whole = param._replace(rows=rows, device=torch.device("cpu"), local=None)
    tensors = {key: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for key, t in whole.layout().items()}
    for moment, fmt in whole.codes:
        keys = {part: f"{moment.name}.{part}" if part else moment.name for part in fmt.layout(moment, rows)}
        record.moments[moment.name].copy(rows, {part: tensors[key] for part, key in keys.items()})
    if record.master is not None:
        record.master.stored.copy(rows, {"": tensors[whole.master.key]})
    return {"step": state["step"].detach().cpu().clone(), **tensors}
