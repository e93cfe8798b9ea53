"""A running optimizer as a source of state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memopt.checkpoint.conversion.in_place import param_states
from memopt.checkpoint.state.saved import SavedGroup, Source
from memopt.optim.edits.group_checks import TORCH_KEYS, is_named

if TYPE_CHECKING:
    from memopt.optimizer import Optimizer


def source_of(optimizer: Optimizer) -> Source:
    """The optimizer's state in its own memory. Raises ValueError on one of several ranks, which has not all rows."""
    optimizer.setup.check_whole()
    if optimizer.partition.world_size > 1:
        raise ValueError(
            f"this is rank {optimizer.partition.rank} of {optimizer.partition.world_size}, which holds "
            "some rows only; save a checkpoint and convert that"
        )
    records = {
        param.name: param.record(optimizer.state.get(p, {}))
        for p, param in param_states(optimizer, optimizer.spec, optimizer.param_groups, optimizer.partition)
    }
    names = iter(records)
    groups = [
        SavedGroup([next(names) for _ in group["params"]], {k: v for k, v in group.items() if k not in TORCH_KEYS})
        for group in optimizer.param_groups
    ]
    named = is_named(optimizer.param_groups)
    return Source(optimizer.spec, groups, records, "the optimizer", named, optimizer.seed, optimizer.skipped_steps)
