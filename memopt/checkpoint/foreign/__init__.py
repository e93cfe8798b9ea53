"""Optimizer state of other tools, one file each. ``TOOLS`` are asked in order whether they wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memopt.checkpoint.foreign import bitsandbytes, flashoptim, torch_optim, torchao, transformers_adafactor
from memopt.checkpoint.foreign.base import Tool, choose, group_of
from memopt.checkpoint.stored import Group, Record, Source
from memopt.groups import is_named
from memopt.spec import OptimSpec

TOOLS = (flashoptim.TOOL, bitsandbytes.TOOL, transformers_adafactor.TOOL, torchao.TOOL, torch_optim.TOOL)


def read_state_dict(state_dict: Mapping[str, Any], origin: str, rule: str | None = None) -> Source:
    """A ``state_dict()`` of one of :data:`TOOLS`.

    ``rule`` is needed where the dictionary does not say which of several it was. Raises ValueError for a dictionary
    that none of them wrote.
    """
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError(f"{origin} is not an optimizer's state_dict: it lacks 'state' or 'param_groups'")
    groups = state_dict["param_groups"]
    states: dict[Any, Any] = {key: state for key, state in state_dict["state"].items() if isinstance(state, Mapping)}
    if any("." in str(key) for state in states.values() for key in state):
        raise ValueError(
            f"{origin} is of an optimizer of memopt's: load it with load_state_dict into one of the same "
            "spec and use opt.convert_, or memopt.save and memopt.load, which convert"
        )
    tool = _tool(groups, states, origin)
    first: dict[str, Any] = next((s for s in states.values() if s), {})
    possible = tool.rules(groups[0], first)
    return _source(tool, choose(tool.name, origin, possible, rule), groups, states, origin)


def _tool(groups: Any, states: Any, origin: str) -> Tool:
    samples = [s for s in states.values() if s] or [{}]
    for tool in TOOLS:
        if any(tool.wrote(groups[0], s) for s in samples):
            return tool
    keys = ", ".join(map(str, samples[0])) or "no state"
    known = ", ".join(tool.name for tool in TOOLS)
    raise ValueError(f"{origin} was written by a tool that is not known here: its state has {keys}. Known: {known}")


def _source(tool: Tool, rule: str, groups: Any, states: Any, origin: str) -> Source:
    named = is_named(groups)
    ours, records, index = [], {}, 0
    for group in groups:
        names = list(group.get("param_names") or ()) if named else [str(index + i) for i in range(len(group["params"]))]
        index += len(names)
        known = group_of(names, rule, tool.hyper(group, rule), group)
        ours.append(Group(names, {k: v for k, v in known.hyper.items() if k not in tool.unsaved}))
        for name, key in zip(names, group["params"], strict=True):
            records[name] = _record(tool, rule, name, group, states.get(key) or {}, origin)
    return Source(OptimSpec(rule=rule), ours, records, origin, named, label=f"{rule} of {tool.name}")


def _record(tool: Tool, rule: str, name: str, group: Any, state: Any, origin: str) -> Record:
    try:
        moments, kept = tool.moments(state), tool.kept(group, state)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{origin}, parameter {name}: {error}") from None
    if not moments:
        return Record(name, (), stepped=False)
    if tool is bitsandbytes.TOOL:
        moments = bitsandbytes.renamed(moments, rule)
    shape, dtype = next(iter(moments.values())).shape, "" if kept is None else kept.dtype
    return Record(name, shape, tool.step(state), moments, dtype=dtype, kept=kept)
