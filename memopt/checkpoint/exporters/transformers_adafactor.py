"""transformers' Adafactor."""

from __future__ import annotations

from memopt.checkpoint.exporters.base import Exporter, ExportPlan, ToolDict
from memopt.checkpoint.state.saved import Record, Source
from memopt.spec import OptimSpec

#: Our names of hyperparameters -> its own.
_NAMES = {"d": "clip_threshold", "beta2_decay": "decay_rate"}


def _plan(source: Source) -> ExportPlan:
    if source.spec.rule != "adafactor" or any(g.hyper["convention"] == "torch" for g in source.groups):
        raise ValueError(
            "transformers has Adafactor in its own convention (convention='transformers'), and no other "
            f"rule of ours; this is {source.spec.rule}"
        )
    return ExportPlan(OptimSpec(rule="adafactor", format="factored"), _group, _state)


def _state(record: Record, parts: ToolDict) -> ToolDict:
    found: ToolDict = {"step": int(parts["step"]), "RMS": 0}
    for key, value in parts.items():
        if key.startswith("exp_avg_sq."):
            found[key.replace(".", "_")] = value.squeeze(-1 if key.endswith("row") else -2)
        elif key != "step":
            found[key] = value
    return found


def _group(h: ToolDict) -> ToolDict:
    return {_NAMES.get(k, k): v for k, v in h.items() if k not in ("convention", "maximize", "cautious")}


TRANSFORMERS = Exporter(_plan)
