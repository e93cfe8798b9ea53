"""All rows of a parameter's state on every rank, one parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.master_weights import saved_master
from memopt.checkpoint.conversion.param_state import Slot
from memopt.checkpoint.state.moment_codes import moment_codes
from memopt.checkpoint.state.saved import LivePiece, Record, Stored
from memopt.core.ledger import TensorSpec
from memopt.formats import Format
from memopt.masters import master_of
from memopt.partitions import Partition
from memopt.rules import Moment


def record_of_all(slot: Slot, state: Mapping[str, Tensor], partition: Partition) -> Record:
    """What :meth:`Slot.record` would be if this rank held all rows. Every rank must call this for every parameter."""
    moments = {}
    for moment, fmt in moment_codes(slot.spec, slot.h, slot.name, slot.shape):
        moments[moment.name] = _gathered(slot, state, partition, moment, fmt)
    mine = slot.record(state)
    master = mine.master
    if master is not None:
        whole = _gathered(slot, state, partition, master.stored.moment, master.stored.format)
        master = saved_master(master_of(slot.spec.master, slot.dtype).name, slot.dtype, slot.shape, whole.pieces, None)
    return Record(slot.name, slot.shape, mine.step, moments, dtype=slot.dtype, master=master)


def _gathered(slot: Slot, state: Mapping[str, Tensor], partition: Partition, moment: Moment, fmt: Format) -> Stored:
    pieces = []
    for rank in range(partition.world_size):
        rows = partition.rows(slot.shape, rank, partition.world_size)
        parts = {}
        for part, spec in fmt.layout(moment, rows).items():
            mine = state[f"{moment.name}.{part}" if part else moment.name]
            shared = fmt.is_shared(moment, part, slot.shape)
            parts[part] = mine if shared else _sent(mine, spec, rank, partition, slot.device)
        pieces.append(LivePiece(rows, parts))
    return Stored(moment, fmt, slot.shape, tuple(pieces))


def _sent(mine: Tensor, spec: TensorSpec, rank: int, partition: Partition, device: torch.device) -> Tensor:
    """The part of one rank, on all. Bytes travel: not every backend knows every dtype."""
    import torch.distributed as dist

    here = rank == partition.rank
    out = mine.to(device) if here else torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
    if out.numel():
        group: Any = partition.group or dist.group.WORLD
        dist.broadcast(out.reshape(-1).view(torch.uint8), src=dist.get_global_rank(group, rank), group=group)
    return out
