"""Optimizer state of other tools, one file each. ``TOOLS`` are asked in order whether they wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memopt.checkpoint.importers import (
    bitsandbytes,
    flashoptim,
    muon,
    own_dict,
    torch_optim,
    torchao,
    transformers_adafactor,
)
from memopt.checkpoint.importers.base import Tool, choose, group_of, steps
from memopt.checkpoint.state.saved import Record, SavedGroup, Source
from memopt.optim.edits.group_checks import is_named
from memopt.spec import OptimSpec
from memopt.untrusted import Refused, laid_out
from memopt.untrusted.names import label
from memopt.untrusted.text import printable, shown

TOOLS = (
    flashoptim.TOOL,
    bitsandbytes.TOOL,
    transformers_adafactor.TOOL,
    torchao.TOOL,
    muon.ORIGINAL,
    muon.DION,
    torch_optim.TOOL,
)


def read_state_dict(
    state_dict: Mapping[str, Any],
    origin: str,
    rule: str | None = None,
    likely: str | None = None,
    rows: own_dict.RowsHere | None = None,
) -> Source:
    """A ``state_dict()`` of one of :data:`TOOLS`, or of an optimizer of memopt's, of which ``rows`` may say which rows
    are in it.

    ``rule`` is needed where the dictionary does not say which of several it was, and none of them is the ``likely``
    one. Raises ValueError for a dictionary
    that none of them wrote.
    """
    groups, states = check_form(state_dict, origin)
    if own_dict.wrote(state_dict):
        return own_dict.read(state_dict, origin, rule, rows)
    with laid_out(origin, "an optimizer's state_dict"):
        tool = _tool(groups, states, origin)
        first: dict[str, Any] = next((s for s in states.values() if s), {})
        possible = tool.rules(groups[0], first)
        return _source(tool, choose(tool.name, origin, possible, rule, likely), groups, states, origin)


def check_form(state_dict: Mapping[str, Any], origin: str) -> tuple[Any, Any]:
    """Groups and states. Raises ValueError unless these are param groups with numbers or names, and their states by
    those."""
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError(f"{origin} is not an optimizer's state_dict: it lacks 'state' or 'param_groups'")
    groups, states = state_dict["param_groups"], state_dict["state"]
    if isinstance(states, Mapping):
        states = {key: state for key, state in states.items() if isinstance(state, Mapping)}
    if not isinstance(groups, list) or not groups:
        raise Refused(f"{origin} is not an optimizer's state_dict: its param_groups are {shown(groups)}")
    seen: set[Any] = set()
    for i, group in enumerate(groups):
        members = group.get("params") if isinstance(group, Mapping) else None
        names = group.get("param_names") if isinstance(group, Mapping) else None
        if not isinstance(members, (list, tuple)) or not all(isinstance(key, (int, str)) for key in members):
            raise Refused(f"{origin} is not an optimizer's state_dict: the params of group {i} are {shown(members)}")
        if names is not None and (not isinstance(names, (list, tuple)) or len(names) != len(members)):
            raise Refused(f"{origin}: group {i} has {len(members)} params, and its param_names are {shown(names)}")
        for key in (*members, *(names or ())):
            label(key if isinstance(key, str) else str(key), f"a parameter in {origin}")
        if seen & set(members) or len(set(members)) != len(members):
            raise Refused(f"{origin} is not an optimizer's state_dict: a parameter is in it twice")
        seen.update(members)
    if not isinstance(states, Mapping) or not all(isinstance(state, Mapping) for state in states.values()):
        raise Refused(
            f"{origin} is not an optimizer's state_dict: its state is {shown(states)}, not one of dictionaries"
        )
    for state in states.values():
        for key in state:
            label(key, f"an entry of the state in {origin}")
    return groups, states


def _tool(groups: Any, states: Any, origin: str) -> Tool:
    samples = [s for s in states.values() if s] or [{}]
    for tool in TOOLS:
        if any(tool.wrote(groups[0], s) for s in samples):
            return tool
    keys = ", ".join(map(str, samples[0])) or "no state"
    tools = ", ".join(tool.name for tool in TOOLS)
    raise ValueError(f"{origin} was written by a tool that is not known here: its state has {keys}. Known: {tools}")


def _source(tool: Tool, rule: str, groups: Any, states: Any, origin: str) -> Source:
    named = is_named(groups)
    ours: list[SavedGroup] = []
    records: dict[str, Record] = {}
    index = 0
    spec = OptimSpec(rule=rule)

    def of_group(group: Mapping[str, Any]) -> str:
        return rule if tool.rule_of is None else tool.rule_of(group)

    if tool.rule_of is not None:
        others = list(dict.fromkeys(own for own in map(of_group, groups) if own != rule))
        if len(others) > 1:
            raise ValueError(
                f"{origin} has groups of {rule} and of {' and of '.join(others)}; two rules are known here"
            )
        spec = OptimSpec(rule=rule, fallback=others[0] if others else "")
    for group in groups:
        own = of_group(group)
        names = list(group.get("param_names") or ()) if named else [str(index + i) for i in range(len(group["params"]))]
        index += len(names)
        one = group_of(names, own, tool.hyper(group, own), group)
        one.hyper.update({"rule": own} if spec.is_mixed else {})
        ours.append(SavedGroup(names, {k: v for k, v in one.hyper.items() if k not in tool.unsaved}))
        for name, key in zip(names, group["params"], strict=True):
            if name in records:
                raise ValueError(f"{origin} has two parameters of the name {shown(name)}")
            records[name] = _record(tool, own, name, group, states.get(key) or {}, origin)
    return Source(spec, ours, records, origin, named, label=f"{rule} of {tool.name}")


def _record(tool: Tool, rule: str, name: str, group: Any, state: Any, origin: str) -> Record:
    try:
        state = tool.state(group, state)
        moments, master = tool.moments(state), tool.master(group, state)
    except (ValueError, LookupError, AttributeError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{origin}, parameter {name}: {printable(str(error), 300)}") from error
    if not moments:
        return Record(name, (), stepped=False)
    if tool is bitsandbytes.TOOL:
        moments = bitsandbytes.renamed(moments, rule)
    shape, dtype = next(iter(moments.values())).shape, "" if master is None else master.dtype
    everything = {**moments, **({} if master is None else {"its master weights": master.stored})}
    for moment, stored in everything.items():
        if stored.shape != shape:
            raise ValueError(
                f"{origin}, parameter {name}: {moment} is {list(stored.shape)}, and others are {list(shape)}"
            )
    return Record(
        name, shape, steps(tool.step(state), f"{origin}, parameter {name}"), moments, dtype=dtype, master=master
    )
