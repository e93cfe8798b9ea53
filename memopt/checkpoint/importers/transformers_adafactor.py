"""transformers' Adafactor."""

from __future__ import annotations

from typing import Any

from memopt.checkpoint.importers.base import Tool, ToolState, factors, plain
from memopt.checkpoint.state.saved import Stored

#: Its name -> ours.
_NAMES = {"clip_threshold": "d", "decay_rate": "beta2_decay"}
_SAME = ("lr", "eps", "beta1", "weight_decay", "scale_parameter", "relative_step", "warmup_init")


def hyper(group: ToolState, rule: str) -> dict[str, Any]:
    renamed = {ours: group[theirs] for theirs, ours in _NAMES.items()}
    return {**{key: group[key] for key in _SAME}, **renamed, "convention": "transformers"}


def moments(state: ToolState) -> dict[str, Stored]:
    found = {name: plain(name, state[name]) for name in ("exp_avg", "exp_avg_sq") if name in state}
    if "exp_avg_sq_row" in state:
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        found["exp_avg_sq"] = factors(row.unsqueeze(-1), col.unsqueeze(-2))
    return found


TOOL = Tool(
    name="transformers' Adafactor",
    wrote=lambda group, state: "clip_threshold" in group,
    rules=lambda group, state: ("adafactor",),
    hyper=hyper,
    moments=moments,
)
