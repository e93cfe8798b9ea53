"""``load_state_dict``: a saved state is held against the optimizer before anything is changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memopt.core.param_names import clean_names
from memopt.core.rows import is_narrow
from memopt.layout.replaced_state import is_own, own_entries
from memopt.masters import MASTERS
from memopt.optim.saving.dtensors import has_dtensors, unwrapped
from memopt.partitions.dtensor import is_dtensor

if TYPE_CHECKING:
    from memopt.optim.params import Params
    from memopt.optim.state_store import StateStore

#: Keys that torch.optim keeps in a group and that say how it computes, not what.
TORCH_EXECUTION = ("foreach", "fused", "capturable", "differentiable")


class LoadPlan(NamedTuple):
    states: list[tuple[tuple[str, Tensor, dict[str, Any]], dict[str, Any]]]
    without_state: list[Tensor]
    others: dict[Any, Any]  # state under keys that are no parameters
    groups: list[dict[str, Any]]  # what each param group is updated with
    group_ids: list[int]
    metadata: Mapping[str, Any]

    def hyper_of(self, group: dict[str, Any]) -> dict[str, Any]:
        return self.groups[self.group_ids.index(id(group))]


def plan_load(params: Params, state_dict: Mapping[str, Any]) -> LoadPlan:
    """Match a saved dictionary with the optimizer's parameters. Raises ValueError with what does not fit."""
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(f"a state_dict has 'state' and 'param_groups'; this one lacks {missing[0]!r}")
    metadata = state_dict.get("memopt", {})
    if has_dtensors(state_dict):
        state_dict = unwrapped(state_dict)
    else:
        _check_world(params, metadata)
    here = list(params.entries())  # which puts names right, too
    groups = _plan_groups(params, state_dict["param_groups"])

    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    states, without = [], []
    origin = _origin(params, metadata)
    for saved_id, (name, p, group) in zip(saved_ids, here, strict=True):
        saved = state_dict["state"].get(saved_id)
        if not saved:
            without.append(p)
            continue
        hyper = groups[next(i for i, g in enumerate(params.owner.param_groups) if g is group)]
        _check_state(params, name, p, {**group, **hyper}, saved, origin)
        states.append(((name, p, group), saved))
    others = {key: value for key, value in state_dict["state"].items() if key not in set(saved_ids)}
    lost = [key for key in others if isinstance(key, int)]
    if lost:
        raise ValueError(f"the state_dict has state for {len(lost)} parameters that are in none of its groups")
    return LoadPlan(
        states, without, copy.deepcopy(others), groups, [id(g) for g in params.owner.param_groups], metadata
    )


def _origin(params: Params, metadata: Mapping[str, Any]) -> str:
    """What an error says of a state that is of another spec, and what would convert it."""
    old, new = metadata.get("spec"), str(params.setup.spec)
    if old is None:
        return "; memopt.load(state_dict, optimizer=...) reads and converts the state of other tools"
    if old == new:
        return ""
    return (
        f" (the state was saved by {old!r}, this is {new!r}: load it into an optimizer of {old!r} and use "
        f"opt.convert_({new!r}), or memopt.save and memopt.load, which convert)"
    )


def _check_world(params: Params, metadata: Mapping[str, Any]) -> None:
    saved = metadata.get("rank", 0), metadata.get("world_size", 1)
    if saved != (params.setup.partition.rank, params.setup.partition.world_size):
        raise ValueError(
            f"this state is rank {metadata.get('rank')} of {metadata.get('world_size')}, and it is loaded "
            f"on rank {params.setup.partition.rank} of {params.setup.partition.world_size}; "
            "a sharded state loads on the rank and world size that saved it"
        )
    if metadata and metadata.get("cut") != params.setup.partition.cut():
        raise ValueError(
            "this state is of parameters that were cut elsewhere; it loads under the DeepSpeed stage and "
            "with the param groups that saved it"
        )


def _plan_groups(params: Params, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours = params.owner.param_groups
    counts = [len(g["params"]) for g in saved], [len(g["params"]) for g in ours]
    if counts[0] != counts[1]:
        raise ValueError(f"the param groups differ: saved with {counts[0]} parameters each, here {counts[1]}")
    saved_names, our_names = _comparable(saved), _comparable(ours)
    planned = []
    for mine, theirs in zip(ours, saved, strict=True):
        names = next(saved_names), next(our_names)
        if names[0] and names[1] and names[0] != names[1]:
            first = next((a, b) for a, b in zip(*names, strict=True) if a != b)
            raise ValueError(f"the parameters differ: saved {first[0]!r} where there is {first[1]!r} here")
        keys = {k: v for k, v in theirs.items() if k not in ("params", "param_names", *TORCH_EXECUTION)}
        params.setup.rule_of(mine).check({**mine, **keys})
        if keys.get("rule", mine.get("rule")) != mine.get("rule"):
            raise ValueError(f"the param groups differ: saved as one of {keys['rule']}, here of {mine.get('rule')}")
        planned.append(copy.deepcopy(keys))
    return planned


def _comparable(groups: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The names of each group, without what a wrapper put before them."""
    names = [group.get("param_names") or [] for group in groups]
    cleaned = iter(clean_names(name for some in names for name in some))
    return ([next(cleaned) for _ in some] for some in names)


def _check_state(
    params: Params, name: str, p: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any], origin: str
) -> None:
    rule = params.setup.rule_of(group)
    own = own_entries(rule.name, saved)
    saved = {key: value for key, value in saved.items() if key not in own}
    lines = {line.key: line for line in params.resolve(name, p, rule.keeping(group, saved)).lines("cpu")}
    # A master of zeros stands for the weights as they are: state without one needs nothing made up.
    master = MASTERS[params.setup.spec.master].key
    lacking = [key for key in lines if key not in saved and key != master]
    unknown = [key for key in saved if key not in lines]
    if lacking or unknown:
        what = f"lacks {lacking[0]!r}" if lacking else f"has {unknown[0]!r}, which is not kept here"
        raise ValueError(f"{name}: the saved state {what}; here it is {', '.join(lines)}{origin}")
    for key, value in saved.items():
        line = lines[key]
        if key == "step":
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{name}: the saved 'step' has shape {tuple(value.shape)}; it is one number")
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: the saved {key!r} is a {type(value).__name__}, not a tensor")
        dtype = getattr(torch, line.dtype)
        if tuple(value.shape) != line.shape or value.dtype != dtype:
            raise ValueError(
                f"{name}: the saved {key!r} is {value.dtype} {tuple(value.shape)}, "
                f"here it is {dtype} {line.shape}{origin}"
            )


def load(
    store: StateStore, state_dict: Mapping[str, Any], convert: Callable[[Mapping[str, Any]], None]
) -> Mapping[str, Any]:
    """Check all of it, then write it; returns what was saved beside the state. What another optimizer saved is for
    ``convert``, unless the optimizer was made to refuse it."""
    refuse = store.setup.on_mismatch == "refuse"
    other = _of_another(store.params, state_dict)
    # Of another spec, tensors may be of the same keys and sizes and mean something else.
    meant_otherwise = other and not refuse and "memopt" in state_dict
    if meant_otherwise or (not other and _has_all_rows(store.params, state_dict)):
        convert(apart(store, state_dict))
        return {}
    try:
        plan = plan_load(store.params, state_dict)
    except ValueError:
        if refuse or not (other or _is_earlier(store.params, state_dict)):
            raise
        convert(apart(store, state_dict))
        return {}
    _refuse_own(store, plan)
    with store.restoring("load_state_dict()"):
        _write(store, plan)
    return plan.metadata


def _is_earlier(params: Params, state_dict: Mapping[str, Any]) -> bool:
    """Whether it is of a version that kept narrow rows in 32 bits whatever their format."""
    if not {"memopt", "state", "param_groups"} <= state_dict.keys():
        return False
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    for saved_id, (name, p, group) in zip(saved_ids, params.entries(), strict=False):
        layout = params.resolve(name, p, group)
        if is_narrow(layout.rows.shape) and not layout.coded.isdisjoint(state_dict["state"].get(saved_id) or {}):
            return True
    return False


def _has_all_rows(params: Params, state_dict: Mapping[str, Any]) -> bool:
    """Whether the dictionary is one process's, or was consolidated, and this rank keeps some of the rows."""
    partition, saved = params.setup.partition, state_dict.get("memopt", {})
    return params.setup.spec.partition == "zero1" and saved.get("world_size") == 1 != partition.world_size


def _of_another(params: Params, state_dict: Mapping[str, Any]) -> bool:
    """Whether another tool wrote the dictionary, or an optimizer that keeps other state."""
    if not {"state", "param_groups"} <= state_dict.keys():
        return False
    saved = state_dict.get("memopt")
    if saved is None:
        return True
    from memopt.spec import parse

    now = params.setup.spec
    try:
        old = parse(str(saved.get("spec")))
    except ValueError:  # of a spec that is not known here; what comes of it says so
        return True
    overrides = json.loads(saved["overrides"]) if "overrides" in saved else dict(now.overrides)
    engine = saved.get("engine", now.engine)
    return (old.rule, old.format, old.fallback, old.master, engine, overrides) != (
        now.rule,
        now.format,
        now.fallback,
        now.master,
        now.engine,
        dict(now.overrides),
    )


def apart(store: StateStore, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary with copies of tensors that are the optimizer's own, as ``state_dict()`` returns them: converting
    writes into their memory. Raises ValueError where that state was interrupted."""
    own = _own_memory(store)
    state: dict[Any, Any] = {}
    for key, saved in state_dict.get("state", {}).items():
        if isinstance(saved, Mapping):
            _refuse_torn(store, own, str(key), saved)
            saved = {part: x.clone() if _is_in(own, x) else x for part, x in saved.items()}
        state[key] = saved
    return {**state_dict, "state": state}


def _own_memory(store: StateStore) -> set[int]:
    states = [state for state in store.state.values() if isinstance(state, dict)]
    return {t.untyped_storage().data_ptr() for state in states for t in state.values() if _has_memory(t)}


def _has_memory(x: Any) -> bool:
    """Whether x is a tensor with a storage of its own to look at: a subclass that wraps others (torchao's) has none."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.numel() > 0


def _is_in(memory: set[int], x: Any) -> bool:
    local = x.to_local() if is_dtensor(x) else x
    return _has_memory(local) and local.untyped_storage().data_ptr() in memory


def _refuse_own(store: StateStore, plan: LoadPlan) -> None:
    """Raise ValueError for a dictionary whose tensors are the state itself where that was interrupted."""
    if store.setup.integrity.torn is not None:
        own = _own_memory(store)
        for (name, _, _), saved in plan.states:
            _refuse_torn(store, own, name, saved)


def _refuse_torn(store: StateStore, own: set[int], name: str, saved: Mapping[str, Any]) -> None:
    torn = store.setup.integrity.torn
    if torn is not None and any(_is_in(own, x) for x in saved.values()):
        raise ValueError(
            f"{name}: the state_dict holds the optimizer's own tensors, as state_dict() returns them, and they "
            f"are what {torn.split(':')[0]} left; load a copy or a checkpoint"
        )


def _write(store: StateStore, plan: LoadPlan) -> None:
    setup = store.setup
    for (name, p, group), saved in plan.states:
        rule = setup.rule_of(group)
        h = rule.keeping({**group, **plan.hyper_of(group)}, saved)
        target = store.to_overwrite(name, p, h)
        for key in [key for key in target if is_own(rule.name, key)]:
            del target[key]
        for key, tensor in target.items():
            tensor.copy_(torch.as_tensor(saved[key])) if key in saved else tensor.zero_()
        target.update(copy.deepcopy(own_entries(rule.name, saved)))
    for p in plan.without_state:
        store.state.pop(p, None)
    for other in [key for key in store.state if not isinstance(key, Tensor)]:
        del store.state[other]
    store.state.update(plan.others)
    for group, loaded in zip(store.params.owner.param_groups, plan.groups, strict=True):
        group.update(loaded)
    setup.seed = plan.metadata.get("seed", setup.seed)
    store.flush()
