"""All rows of a parameter's state on every rank, one parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.master_weights import saved_master
from memopt.checkpoint.conversion.param_state import ParamState
from memopt.checkpoint.state.moment_codes import moment_codes
from memopt.checkpoint.state.saved import LivePiece, Record, Stored
from memopt.core.ledger import TensorSpec
from memopt.formats import Format
from memopt.partitions import Partition
from memopt.rules import Moment


def record_of_all(param: ParamState, state: Mapping[str, Tensor], partition: Partition) -> Record:
    """What :meth:`ParamState.record` would be if this rank held all rows. Every rank must call this for every
    parameter."""
    moments = {}
    for moment, fmt in moment_codes(param.spec, param.h, param.name, param.shape):
        moments[moment.name] = _gathered(param, state, partition, moment, fmt)
    mine = param.record(state)
    master = mine.master
    if master is not None:
        whole = _gathered(param, state, partition, master.stored.moment, master.stored.format)
        master = saved_master(param.master.name, param.dtype, param.shape, whole.pieces, None)
    return Record(param.name, param.shape, mine.step, moments, dtype=param.dtype, master=master)


def _gathered(
    param: ParamState, state: Mapping[str, Tensor], partition: Partition, moment: Moment, fmt: Format
) -> Stored:
    pieces = []
    for rank in range(partition.world_size):
        rows = partition.rows(param.shape, rank, partition.world_size)
        parts = {}
        for part, spec in fmt.layout(moment, rows).items():
            mine = state[f"{moment.name}.{part}" if part else moment.name]
            shared = fmt.is_shared(moment, part, param.shape)
            parts[part] = mine if shared else _sent(mine, spec, rank, partition, param.device)
        pieces.append(LivePiece(rows, parts))
    return Stored(moment, fmt, param.shape, tuple(pieces))


def _sent(mine: Tensor, spec: TensorSpec, rank: int, partition: Partition, device: torch.device) -> Tensor:
    """The part of one rank, on all. Bytes travel: not every backend knows every dtype."""
    import torch.distributed as dist

    here = rank == partition.rank
    out = mine.to(device) if here else torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
    if out.numel():
        group: Any = partition.group or dist.group.WORLD
        dist.broadcast(out.reshape(-1).view(torch.uint8), src=dist.get_global_rank(group, rank), group=group)
    return out
