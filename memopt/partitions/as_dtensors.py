"""State of sharded parameters as DTensors: how torch.distributed.checkpoint knows whose rows they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memopt.geometry import Rows, Shape
from memopt.layout.param import resolve
from memopt.ledger import dtype_name
from memopt.partitions.dtensor import is_dtensor, like

if TYPE_CHECKING:
    from memopt.keeper import Keeper

#: What calls ``state_dict()`` and keeps one rank's answer, or merges all as replicas: module -> function, where only
#: one of its functions does.
_HELPERS = {
    "torch.distributed.checkpoint.state_dict": "",
    "accelerate.checkpointing": "",
    "transformers.trainer": "_save_optimizer_and_scheduler",
    "lightning.pytorch.strategies.strategy": "optimizer_state",
    "pytorch_lightning.strategies.strategy": "optimizer_state",
}


def wrapped(optimizer: Keeper, packed: Mapping[Any, Any]) -> dict[Any, dict[str, Any]]:
    """The state of ``packed`` (by the parameter's number), each part of a DTensor's state as a DTensor of the part's
    global shape: cut as the parameter is, or whole on every rank. Codes and scales as they are; no copies."""
    found: dict[Any, Any] = {}
    for index, (name, p, group) in enumerate(optimizer._parameters()):
        if index in packed:
            state = dict(packed[index])
            if is_dtensor(p):
                shapes = _shapes(optimizer, name, p, group)
                state = {
                    key: like(p, x, shapes[key][0], replicated=shapes[key][1]) if key in shapes else x
                    for key, x in state.items()
                }
            found[index] = state
    return {**found, **{key: value for key, value in packed.items() if key not in found}}


def _shapes(optimizer: Keeper, name: str, p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[Shape, bool]]:
    """key -> global shape of the part, and whether every rank has all of it."""
    here = optimizer._rows(p)
    shape = tuple(p.shape)
    whole = Rows.whole(shape).in_units(here.flat)
    none = Rows(shape, 0, 0, here.flat)

    def lines(rows: Rows) -> dict[str, Shape]:
        layout = resolve(optimizer.spec, group, name, 0, rows, dtype_name(p))
        return {line.key: line.shape for line in layout.lines("cpu")}

    empty = lines(none)
    return {key: (full, empty[key] == full) for key, full in lines(whole).items() if key != "step"}


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` with what is here of every DTensor in its state."""
    state: dict[Any, Any] = {
        key: {part: x.to_local() if is_dtensor(x) else x for part, x in parts.items()}
        if isinstance(parts, Mapping)
        else parts
        for key, parts in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def has_dtensors(state_dict: Mapping[str, Any]) -> bool:
    states = (parts for parts in state_dict["state"].values() if isinstance(parts, Mapping))
    return any(is_dtensor(x) for parts in states for x in parts.values())


def refuse_helpers(optimizer: Keeper) -> None:
    """Raise RuntimeError where torch.distributed.checkpoint, accelerate's save_state, Trainer or Lightning asks for
    rows that no DTensor describes: they would take them for replicas, and save one rank's."""
    if optimizer.spec.partition != "zero1" or optimizer.partition.world_size == 1:
        return
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        module = frame.f_globals.get("__name__", "")
        if module in _HELPERS and _HELPERS[module] in ("", frame.f_code.co_name):
            raise RuntimeError(
                f"'{optimizer.spec}' keeps rows of replicated parameters, which {module} would "
                "take for replicas of one another; save with memopt.save, or shard with '/zero2'"
            )
