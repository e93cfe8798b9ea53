"""``state_dict()`` of an optimizer of memopt's, of any spec: what frameworks keep in ``optimizer.pt`` and the like."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from memopt.checkpoint.conversion.param_state import ParamState
from memopt.checkpoint.state.saved import Record, SavedGroup, Source
from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Rows, is_narrow
from memopt.formats.base import CODES
from memopt.layout.replaced_state import own_entries
from memopt.optim.edits.group_checks import TORCH_KEYS, is_named
from memopt.optim.saving.dtensors import has_dtensors, unwrapped
from memopt.optim.saving.state_dict import described_parameters
from memopt.partitions import PARTITIONS
from memopt.placements.stores.by_placement import PlacementStores
from memopt.rules import RULES
from memopt.spec import OptimSpec, parse
from memopt.untrusted import laid_out
from memopt.untrusted.text import printable, shown


def wrote(state_dict: Mapping[str, Any]) -> bool:
    """Whether an optimizer of memopt's wrote the dictionary."""
    return isinstance(state_dict.get("memopt"), Mapping) and "spec" in state_dict["memopt"]


#: A parameter's name in the dictionary, its dtype, and the rows of it whose state is there; None where it has no shape.
Described = tuple[str, str, Rows | None]
#: What a dictionary's parameters are, in the order of its groups, where the reader has the same rows of them.
RowsHere = Callable[[Mapping[str, Any]], list[Described] | None]


def read(
    state_dict: Mapping[str, Any], origin: str, rule: str | None = None, rows_here: RowsHere | None = None
) -> Source:
    """The dictionary as a source: of one of several ranks, the rows of that rank, by its own account unless
    ``rows_here`` has another.

    Raises ValueError for a dictionary that does not say what its parameters are (those of versions before this one),
    and for one whose state is not what its spec keeps.
    """
    here = rows_here(state_dict) if rows_here is not None else None
    if has_dtensors(state_dict):
        state_dict = unwrapped(state_dict)
    with laid_out(origin, "an optimizer's state_dict"):
        saved = state_dict["memopt"]
        spec = spec_of(saved, origin)
        if rule not in (None, spec.rule):
            raise ValueError(f"{origin} is of {spec.rule}, not {rule!r}")
        groups, parameters = state_dict["param_groups"], here or _described(saved, spec, origin)
        numbers = [number for group in groups for number in group["params"]]
        if len(numbers) != len(parameters):
            raise ValueError(f"{origin} has {len(numbers)} parameters in its groups and describes {len(parameters)}")
        described, named = iter(parameters), is_named(groups)
        in_memory = PlacementStores(spec.replace(placement="device", overrides={}), 0, 1)
        ours: list[SavedGroup] = []
        records: dict[str, Record] = {}
        for group, members in _members(groups, described):
            own = RULES[spec.rule_of(group)]
            h = {**own.hyperparameters, **plain(group)}
            own.check(h)
            ours.append(SavedGroup([name for _, (name, _, _) in members], plain(group)))
            for number, parameter in members:
                if parameter[0] in records:
                    raise ValueError(f"{origin} has two parameters of the name {shown(parameter[0])}")
                index, state = len(records), state_dict["state"].get(number) or {}
                records[parameter[0]] = _record(
                    spec, h, parameter, index, state, saved.get("seed", 0), in_memory, origin
                )
        others = {key: x for key, x in state_dict["state"].items() if key not in set(numbers)}
        lost = [key for key in others if isinstance(key, int)]
        if lost:
            raise ValueError(f"{origin} has state for {len(lost)} parameters that are in none of its groups")
        return Source(
            spec, ours, records, origin, named, saved.get("seed"), saved.get("skipped_steps"),
            others=copy.deepcopy(others),
        )  # fmt: skip


def _described(saved: Mapping[str, Any], spec: OptimSpec, origin: str) -> list[Described]:
    if saved.get("cut") is not None:
        raise ValueError(f"{origin} is of DeepSpeed's vectors: it loads under the stage and groups that saved it")
    if "parameters" not in saved:
        raise ValueError(f"{origin} does not say what its parameters are: load it into an optimizer of '{spec}'")
    rows, ranks = PARTITIONS[spec.partition].rows, (saved.get("rank", 0), saved.get("world_size", 1))
    return [(name, dtype, rows(shape, *ranks)) for name, dtype, shape in described_parameters(saved)]


def spec_of(saved: Mapping[str, Any], origin: str) -> OptimSpec:
    try:
        spec = parse(str(saved["spec"])).replace(options={})
        spec = spec.replace(
            engine=str(saved.get("engine", "native")), overrides=dict(json.loads(saved.get("overrides", "{}")))
        )
    except (SpecError, json.JSONDecodeError) as error:
        raise ValueError(f"{origin} is of a spec that is not known here: {printable(str(error), 200)}") from error
    coded = spec.formats[1] == "8bit" or any("8bit" in text for text in spec.overrides.values())
    if coded and saved.get("codes") != CODES:
        raise ValueError(
            f"{origin} has second moments in 8bit, which was another code in the version that wrote it: convert it to "
            "32bit or bf16 with that version"
        )
    return spec


def _members(groups: Any, described: Iterator[Any]) -> Iterator[tuple[Any, list[tuple[Any, Any]]]]:
    for group in groups:
        yield group, [(number, next(described)) for number in group["params"]]


def groups_of(state_dict: Mapping[str, Any], names: list[str]) -> list[SavedGroup]:
    """Its groups, of parameters that have these names in the groups' order."""
    rest = iter(names)
    return [SavedGroup([next(rest) for _ in group["params"]], plain(group)) for group in state_dict["param_groups"]]


def plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in TORCH_KEYS}


def _record(
    spec: OptimSpec,
    h: Mapping[str, Any],
    parameter: Described,
    index: int,
    state: Mapping[str, Any],
    seed: int,
    placement_stores: PlacementStores,
    origin: str,
) -> Record:
    name, dtype, rows = parameter
    if rows is None:
        if state:
            raise ValueError(f"{origin} has state of {name}, which has no shape yet: it must see data first")
        return Record(name, (), stepped=False)
    rule = RULES[spec.rule_of(h)]
    param = ParamState(
        spec,
        rule.keeping(h, state),
        name,
        index,
        rows,
        torch.device("cpu"),
        seed,
        lambda x: x,
        dtype,
        placement_stores,
    )
    own = own_entries(rule.name, state)
    ours = {key: value for key, value in state.items() if key not in own}
    if ours:
        coded = {moment.name for moment, fmt in param.codes if "" not in fmt.layout(moment, param.rows)}
        if is_narrow(rows.shape) and ours.keys() >= coded > set():  # of a version that had narrow rows in 32 bits
            param = param._replace(spec=param.spec.replace(format="32bit", overrides={}))
        check(param, ours, origin)
        if param.master.key and param.master.key not in ours:  # one of zeros stands for the weights as they are
            param = param._replace(spec=param.spec.replace(master="none"))
    record = param.record(ours)
    record.state = ours
    if own:
        record.own = lambda rank: copy.deepcopy(own)
    return record


def check(param: ParamState, state: Mapping[str, Any], origin: str) -> None:
    """Raise ValueError for state that is not what the spec keeps of the parameter."""
    layout, master = param.layout(), param.master.key
    missing = [key for key in layout if key not in state and key != master]
    unknown = [key for key in state if key not in layout and key != "step"]
    if missing or unknown or "step" not in state:
        what = f"lacks {(missing or ['step'])[0]!r}" if not unknown else f"has {unknown[0]!r}"
        raise ValueError(
            f"{origin}, parameter {param.name}: the state {what}; '{param.spec}' keeps {', '.join(layout)}"
        )
    for key, value in state.items():
        spec = layout.get(key)
        if spec is not None and (
            not isinstance(value, torch.Tensor)
            or str(value.dtype).removeprefix("torch.") != spec.dtype
            or tuple(value.shape) != spec.shape
        ):
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"{origin}, parameter {param.name}: {key} is {found}, and '{param.spec}' has {spec.dtype} "
                f"{list(spec.shape)}"
            )
