"""The original Muon with AdamW for the rest (``MuonWithAuxAdam``), and DeepSpeed's of the same name."""

from __future__ import annotations

from memopt.checkpoint.exporters.base import Exporter, ExportPlan, ToolDict
from memopt.checkpoint.state.saved import Record, Source
from memopt.spec import OptimSpec

#: What each kind of group has.
_KEYS = {"muon": ("lr", "momentum", "weight_decay"), "adamw": ("lr", "betas", "eps", "weight_decay")}


def _plan(source: Source) -> ExportPlan:
    rules = {name: source.rule_of(name).name for group in source.groups for name in group.names}
    others = sorted(set(rules.values()) - set(_KEYS))
    if others or "muon" not in rules.values():
        raise ValueError(
            f"the original Muon has muon and adamw, and this state is of {', '.join(others or rules.values())}"
        )
    for h in (one.hyper for one in source.groups):
        if h.get("rule", "muon") == "muon":
            # What the original does and does not say: Nesterov, five iterations, its own scaling of the rate.
            said = {"nesterov": True, "adjust_lr_fn": "original", "beta2": 0.0, "split_rows": None, "ns_steps": 5}
            wrong = [f"{k}={h[k]!r}" for k, v in said.items() if k in h and h[k] != v]
            if wrong:
                raise ValueError(f"the original Muon cannot be told {', '.join(wrong)}")
        if h.get("maximize") or h.get("amsgrad"):
            raise ValueError("the original Muon has neither maximize nor amsgrad")

    def group(h: ToolDict) -> ToolDict:
        rule = str(h.get("rule", "muon"))
        return {**{k: h[k] for k in _KEYS[rule]}, "use_muon": rule == "muon"}

    def state(record: Record, parts: ToolDict) -> ToolDict:
        if rules[record.name] == "muon":
            return {k: v for k, v in parts.items() if k != "step"}
        return {**parts, "step": int(parts["step"])}

    return ExportPlan(OptimSpec(rule="muon", fallback="adamw"), group, state)


MUON = Exporter(_plan)
