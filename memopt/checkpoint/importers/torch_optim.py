"""torch.optim: Adam, AdamW, RAdam, SGD, RMSprop, Adafactor, Muon."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memopt.checkpoint.importers.base import Tool, ToolState, factors, plain
from memopt.checkpoint.state.saved import Stored
from memopt.rules import RULES

#: rule -> a key of its groups that no other optimizer of torch's has beside our other rules.
_MARKS = {"radam": "decoupled_weight_decay", "rmsprop": "centered", "sgd": "nesterov", "adafactor": "beta2_decay"}
#: Keys of a state that are no moments.
_NO_MOMENTS = ("step", "row_var", "col_var", "variance")


def rules(group: ToolState, state: ToolState) -> tuple[str, ...]:
    if "momentum_decay" in group or "mu_product" in state:
        return ()
    if "ns_coefficients" in group:
        return ("muon",)
    if "amsgrad" in group:
        # Before torch 2.7 Adam and AdamW are not told apart by what they save.
        decoupled = group.get("decoupled_weight_decay")
        return ("adam", "adamw") if decoupled is None else ("adamw",) if decoupled else ("adam",)
    return tuple(rule for rule, mark in _MARKS.items() if mark in group)


def hyper(group: ToolState, rule: str) -> dict[str, Any]:
    ours = RULES[rule].hyperparameters
    found = {key: group[key] for key in ours if key in group}
    if rule == "muon" and found.get("adjust_lr_fn") is None:
        found["adjust_lr_fn"] = "original"
    if rule == "adafactor":
        found |= {"convention": "torch", "scale_parameter": True, "relative_step": True}
    return found


def moments(state: ToolState) -> dict[str, Stored]:
    found = {k: plain(k, v) for k, v in state.items() if k not in _NO_MOMENTS and isinstance(v, Tensor)}
    if "row_var" in state:
        found["exp_avg_sq"] = factors(state["row_var"], state["col_var"])
    elif "variance" in state:
        found["exp_avg_sq"] = plain("exp_avg_sq", state["variance"])
    return found


TOOL = Tool(
    name="torch.optim",
    wrote=lambda group, state: (
        bool(rules(group, state)) and not any(type(v) not in (Tensor, float, int, type(None)) for v in state.values())
    ),
    rules=rules,
    hyper=hyper,
    moments=moments,
    # SGD and Muon do not count their steps; that there is a buffer says that one has been taken.
    step=lambda state: float(state.get("step", 1)),
)
