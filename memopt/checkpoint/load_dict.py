"""``load_state_dict``: a dictionary of this optimizer, of one of another spec, or of another tool."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.report import Conversion, spelled
from memopt.checkpoint.importers import check_form, own_dict, read_state_dict
from memopt.checkpoint.load_state import StateLoad, is_same, match
from memopt.checkpoint.state.saved import Source
from memopt.core.ledger import dtype_name
from memopt.core.user_warning import warn
from memopt.optim.edits.group_checks import is_named
from memopt.optim.edits.param_groups import has_shape
from memopt.optim.saving.dtensors import has_dtensors
from memopt.optim.saving.state_dict import described
from memopt.partitions import PARTITIONS
from memopt.partitions.dtensor import local_of

if TYPE_CHECKING:
    from memopt.optim.parts import OptimizerParts
    from memopt.optim.state_store import StateStore

ORIGIN = "the state_dict"
#: What of a spec decides the tensors of a state.
_OF_STATE = ("rule", "format", "fallback", "master", "engine", "overrides")


def load_dict(optimizer: OptimizerParts, state_dict: Mapping[str, Any]) -> None:
    """Load the state, and say in one warning what was lost of each moment where it was converted.

    Raises ValueError, before anything is changed, for what no tool known here wrote, for other parameters or groups,
    and for what would be converted where the optimizer was made to refuse that; SpecError for a moment that was not
    saved and would have to be made up.
    """
    source = _source(optimizer, _with_names_of_its_own(state_dict))
    if optimizer.setup.on_mismatch == "refuse":
        _refuse_conversion(source, optimizer)
    plan = StateLoad(optimizer, source, hyper=True, fill={})
    with optimizer.store.restoring("load_state_dict()"):
        _tell(plan.apply())


def _with_names_of_its_own(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dictionary without the names of groups that have others than parameters: DeepSpeed puts one vector in the
    place of all parameters of a group, and leaves it their names."""
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or not all(map(_is_of_others, groups)):
        return state_dict
    return {**state_dict, "param_groups": [{k: v for k, v in group.items() if k != "param_names"} for group in groups]}


def _is_of_others(group: Any) -> bool:
    members, names = (group.get("params"), group.get("param_names")) if isinstance(group, Mapping) else (None, None)
    return isinstance(members, list) and len(members) == 1 and isinstance(names, list) and len(names) > 1


def _source(optimizer: OptimizerParts, state_dict: Mapping[str, Any]) -> Source:
    store, rows = optimizer.store, partial(_rows_here, optimizer)
    ours = {"spec": str(optimizer.spec), **described(optimizer.params)}
    if not own_dict.wrote(state_dict):  # some frameworks pass on what torch.optim has, and nothing else
        with suppress(ValueError):
            named = {**apart(store, state_dict, in_place=True), "memopt": ours}
            source = read_state_dict(named, ORIGIN, rows=rows)
            if all(record.stepped or record.own is None for record in source.records.values()):
                return source  # nothing in it means nothing to this rule
        return read_state_dict(apart(store, state_dict), ORIGIN, likely=optimizer.spec.rule)
    saved = state_dict["memopt"]
    same = all(saved.get(key) == value for key, value in ours.items())
    return read_state_dict(apart(store, state_dict, in_place=same), ORIGIN, rows=rows)


def _rows_here(optimizer: OptimizerParts, state_dict: Mapping[str, Any]) -> list[own_dict.Described] | None:
    """The parameters of the dictionary, in its order, where it has the rows that are here; None where it has all rows
    and here are some. Raises ValueError where it has others, and for other parameters."""
    partition, saved = optimizer.partition, state_dict["memopt"]
    if not has_dtensors(state_dict):
        ranks = saved.get("rank", 0), saved.get("world_size", 1)
        if ranks[1] == 1 < partition.world_size:
            return None
        if ranks != (partition.rank, partition.world_size):
            raise ValueError(
                f"this state is rank {ranks[0]} of {ranks[1]}, and it is loaded on rank {partition.rank} of "
                f"{partition.world_size}; opt.consolidate_state_dict() before state_dict(), or memopt.save and "
                "memopt.load, go from one number of ranks to another"
            )
    if saved.get("world_size", 1) > 1:
        spec, mine = own_dict.spec_of(saved, ORIGIN), optimizer.spec
        if PARTITIONS[spec.partition].rows is not PARTITIONS[mine.partition].rows:
            raise ValueError(
                f"this state is one rank's of '{spec}', and it is loaded into '{mine}', of which a rank has other "
                "rows; memopt.save and memopt.load go from one to the other"
            )
    if saved.get("cut") != partition.cut():
        raise ValueError(
            "this state is of parameters that were cut elsewhere; it loads under the DeepSpeed stage and with the "
            "param groups that saved it"
        )
    groups, entries = state_dict["param_groups"], list(optimizer.params.entries())
    named = is_named(groups)
    numbers = [number for group in groups for number in group["params"]]
    names = [name for group in groups for name in group.get("param_names") or ()] if named else None
    names = names or [str(i) for i in range(len(numbers))]
    match(names, [name for name, _, _ in entries], named and is_named(optimizer.param_groups), ORIGIN, ordered=True)
    return [
        (name, dtype_name(p), partition.local_rows(p) if has_shape(p) else None)
        for name, (_, p, _) in zip(names, entries, strict=True)
    ]


def _refuse_conversion(source: Source, optimizer: OptimizerParts) -> None:
    old, new = spelled(source.spec), spelled(optimizer.spec)
    if source.label:
        raise ValueError(
            f"{ORIGIN} is of {source.label}, and on_mismatch='refuse'; memopt.load(state_dict, optimizer=...) reads "
            "and converts the state of other tools"
        )
    if any(getattr(source.spec, what) != getattr(optimizer.spec, what) for what in _OF_STATE):
        raise ValueError(
            f"{ORIGIN} was saved by {old!r}, this is {new!r}: load it into an optimizer of {old!r} and use "
            f"opt.convert_({new!r}), or memopt.save and memopt.load, which convert"
        )


def _tell(report: Conversion) -> None:
    if report.before == report.after and not report.dropped and not any(x.encoded for x in report.losses.values()):
        return
    losses = ", ".join(f"{moment} {loss.relative_error:.2g}" for moment, loss in report.losses.items() if loss.encoded)
    dropped = f"; dropped: {', '.join(report.dropped)}" if report.dropped else ""
    warn(
        f"load_state_dict: the state of {report.before} was converted to {report.after}; relative error: "
        f"{losses or 'none'}{dropped}"
    )


# Dictionaries whose tensors are the optimizer's own ------------------------------------------------------------------


def apart(store: StateStore, state_dict: Mapping[str, Any], in_place: bool = False) -> dict[str, Any]:
    """The dictionary with copies of tensors that are the optimizer's own, as ``state_dict()`` returns them: loading
    writes into their memory. With ``in_place`` a parameter's whole state stays where it is that very state: what loads
    into the tensors themselves (torch.distributed.checkpoint) needs no second copy of them. Raises ValueError where
    that state was interrupted."""
    check_form(state_dict, ORIGIN)
    states = [state for state in store.state.values() if isinstance(state, dict)]
    own = {address for state in states for x in state.values() if (address := _address(x))}
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    there = dict(zip(numbers, (store.state.get(p) for _, p, _ in store.params.entries()), strict=False))
    state: dict[Any, Any] = {}
    for key, saved in state_dict["state"].items():
        mine = [part for part, x in saved.items() if _address(x) in own] if isinstance(saved, Mapping) else []
        torn = store.setup.integrity.torn
        if torn is not None and mine:
            raise ValueError(
                f"parameter {key}: the state_dict holds the optimizer's own tensors, as state_dict() returns them, and "
                f"they are what {torn.split(':')[0]} left; load a copy or a checkpoint"
            )
        if mine and not (in_place and is_same(saved, there.get(key) or {})):
            saved = {part: x.clone() if part in mine else x for part, x in saved.items()}
        state[key] = saved
    return {**state_dict, "state": state}


def _address(x: Any) -> int:
    """Where the storage of a tensor begins; 0 of a subclass that wraps others (torchao's), and has none to look at."""
    x = local_of(x)
    return x.untyped_storage().data_ptr() if type(x) in (Tensor, torch.nn.Parameter) and x.numel() else 0
