"""``state_dict()`` of an optimizer of memopt's: what frameworks keep in ``optimizer.pt`` and the like."""

from __future__ import annotations

import copy
import json

from memopt.checkpoint.conversion.converted_source import Converted
from memopt.checkpoint.exporters.base import Exporter, ExportPlan, ToolDict
from memopt.formats.base import CODES
from memopt.spec import OptimSpec


def exporter_of(spec: OptimSpec) -> Exporter:
    """What writes the dictionary that an optimizer of this spec would have on one process."""
    return Exporter(
        lambda source: ExportPlan(spec, lambda h: dict(h), lambda record, parts: dict(parts), complete=_complete)
    )


def _complete(found: ToolDict, converted: Converted) -> ToolDict:
    """With what the user has put beside the state, names, and what is needed to tell whether it fits."""
    source, spec = converted.source, converted.spec
    names = [name for group in converted.groups for name in group.names]
    own = converted.own_entries()
    for i, name in enumerate(names):
        if i in found["state"]:
            found["state"][i].update(own.get(name, {}))
    if source.named:
        for group, members in zip(converted.groups, found["param_groups"], strict=True):
            members["param_names"] = list(group.names)
    # Of a parameter that another tool has not stepped, dtype and shape are not known.
    described = [[name, source.records[name].dtype, list(source.records[name].shape)] for name in names]
    return {
        "state": {**found["state"], **copy.deepcopy(dict(source.others))},
        "param_groups": found["param_groups"],
        "memopt": {
            "spec": str(spec),
            "rank": 0,
            "world_size": 1,
            "seed": source.seed or 0,
            "skipped_steps": source.skipped_steps or 0,
            "engine": spec.engine,
            "codes": CODES,
            "overrides": json.dumps(dict(spec.overrides)),
            "parameters": json.dumps(described),
        },
    }
