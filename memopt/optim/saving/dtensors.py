"""State of sharded parameters as DTensors: how torch.distributed.checkpoint knows whose rows they are."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memopt.core.ledger import dtype_name
from memopt.core.rows import Rows, Shape
from memopt.layout.param import resolve_layout
from memopt.partitions.dtensor import is_dtensor, like, local_of

if TYPE_CHECKING:
    from memopt.partitions.base import NamedParam, Partition
    from memopt.spec import OptimSpec

#: What calls ``state_dict()`` and keeps one rank's answer, or merges all as replicas: module -> function, where only
#: one of its functions does.
_HELPERS = {
    "torch.distributed.checkpoint.state_dict": "",
    "accelerate.checkpointing": "",
    "transformers.trainer": "_save_optimizer_and_scheduler",
}
#: Of these, who asks on every rank, so that the ranks can collect all rows then. (Lightning collects them by itself.)
ON_EVERY_RANK = ("accelerate.checkpointing",)
#: Who takes what the ranks have for replicas, whoever has collected what.
REPLICAS = ("torch.distributed.checkpoint.state_dict",)


def wrapped(
    spec: OptimSpec, partition: Partition, entries: Iterable[NamedParam], packed: Mapping[Any, Any]
) -> dict[Any, Any]:
    """The state of ``packed`` (by the parameter's number), each part of a DTensor's state as a DTensor of the part's
    global shape: cut as the parameter is, or whole on every rank. Codes and scales as they are; no copies."""
    found: dict[Any, Any] = {}
    for index, (name, p, group) in enumerate(entries):
        if index in packed:
            state = dict(packed[index])
            if is_dtensor(p):
                shapes = _shapes(spec, partition.local_rows(p), name, p, group)
                state = {
                    key: like(p, x, shapes[key][0], replicated=shapes[key][1]) if key in shapes else x
                    for key, x in state.items()
                }
            found[index] = state
    return {**found, **{key: value for key, value in packed.items() if key not in found}}


def _shapes(
    spec: OptimSpec, here: Rows, name: str, p: Tensor, group: Mapping[str, Any]
) -> dict[str, tuple[Shape, bool]]:
    """key -> global shape of the part, and whether every rank has all of it."""
    shape = tuple(p.shape)
    whole = Rows.whole(shape).in_units(here.flat)
    none = Rows(shape, 0, 0, here.flat)

    def lines(rows: Rows) -> dict[str, Shape]:
        layout = resolve_layout(spec, group, name, 0, rows, dtype_name(p))
        return {line.key: line.shape for line in layout.lines("cpu")}

    empty = lines(none)
    return {key: (full, empty[key] == full) for key, full in lines(whole).items() if key != "step"}


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` with what is here of every DTensor in its state."""
    state: dict[Any, Any] = {
        key: {part: local_of(x) for part, x in parts.items()} if isinstance(parts, Mapping) else parts
        for key, parts in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def has_dtensors(state_dict: Mapping[str, Any]) -> bool:
    states = (parts for parts in state_dict["state"].values() if isinstance(parts, Mapping))
    return any(is_dtensor(x) for parts in states for x in parts.values())


def asking_framework(spec: OptimSpec, partition: Partition) -> str | None:
    """The module that asks for ``state_dict()`` and would keep one rank's rows as if every rank had them; None where
    nobody does, or where a DTensor says whose rows they are."""
    if spec.partition != "zero1" or partition.world_size == 1:
        return None
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        module = str(frame.f_globals.get("__name__", ""))
        if module in _HELPERS and _HELPERS[module] in ("", frame.f_code.co_name):
            return module
    return None


def refuse(spec: OptimSpec, module: str) -> None:
    """Raise RuntimeError with what to do instead."""
    remedy = (
        "give Trainer callbacks=[memopt.integrations.transformers.consolidate_callback()]"
        if module == "transformers.trainer"
        else "call opt.consolidate_state_dict() on every rank before, save with memopt.save, or shard with '/zero2'"
    )
    raise RuntimeError(
        f"'{spec}' keeps rows of replicated parameters, which {module} would take for replicas of one another; {remedy}"
    )
