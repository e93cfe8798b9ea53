"""Muon with another rule for the rest in one optimizer: the original's and DeepSpeed's ``MuonWithAuxAdam``, and dion's.

Each of their param groups says whose it is. Source: KellerJordan/Muon, muon.py; DeepSpeed 0.19,
deepspeed/runtime/zero/muon/original_muon.py; microsoft/dion, dion/muon.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memopt.checkpoint.importers.base import Tool, ToolState, encoded, plain
from memopt.checkpoint.state.saved import Stored
from memopt.core.registry import ALL_FORMATS

#: Hyperparameters by which the original's plain Muon is known: it has no others.
_BARE = {"lr", "weight_decay", "momentum"}
_NOTES = {"params", "param_names", "initial_lr", "swa_lr"}
#: dion's ways to scale the rate by a matrix's shape -> ours.
_ADJUST = {"spectral_norm": "spectral_norm", "rms_norm": "match_rms_adamw", None: "none"}
#: NorMuon's second moment, one number per row.
_ROWS = "row_sq"
_RULES = {"muon": "muon", "normuon": "muon", "adamw": "adamw", "lion": "lion"}


def _moments(state: ToolState) -> dict[str, Stored]:
    found = {k: plain(k, v) for k, v in state.items() if k not in ("step", _ROWS) and isinstance(v, Tensor)}
    if _ROWS in state:
        found[_ROWS] = encoded(
            _ROWS, ALL_FORMATS["rowmean"], found["momentum_buffer"].shape, {"": state[_ROWS].float()}, False
        )
    return found


# The original, and DeepSpeed's -----------------------------------------------------------------------------------


def rule_of(group: ToolState) -> str:
    return "muon" if group.get("use_muon", True) else "adamw"


def hyper(group: ToolState, rule: str) -> dict[str, Any]:
    if rule == "muon":
        return {k: group[k] for k in (*_BARE, "beta2") if k in group} | {"adjust_lr_fn": "original"}
    return {k: group[k] for k in ("lr", "betas", "eps", "weight_decay") if k in group}


ORIGINAL = Tool(
    name="KellerJordan's Muon",
    wrote=lambda group, state: "use_muon" in group or (set(group) - _NOTES == _BARE and "momentum_buffer" in state),
    rules=lambda group, state: ("muon",),
    hyper=hyper,
    moments=_moments,
    # NorMuon's second moment has another name here.
    state=lambda group, state: {_ROWS if k == "second_momentum_buffer" else k: v for k, v in state.items()},
    # Muon does not count its steps; that there is a buffer says that one has been taken.
    step=lambda state: float(state.get("step", 1)),
    rule_of=rule_of,
)


# dion ------------------------------------------------------------------------------------------------------------


def _dion_hyper(group: ToolState, rule: str) -> dict[str, Any]:
    both = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    if rule == "muon":
        if group.get("adjust_lr") not in _ADJUST:
            raise ValueError(f"a group has adjust_lr={group['adjust_lr']!r}, which is not known here")
        found = {"momentum": group["mu"], "nesterov": group["nesterov"], "eps": group["epsilon"]}
        second = {"beta2": group["muon_beta2"]} if "muon_beta2" in group else {}
        return both | found | second | {"adjust_lr_fn": _ADJUST[group.get("adjust_lr")]}
    betas = {"betas": (group["beta1"], group["beta2"])}
    return both | betas | ({"eps": group["epsilon"]} if rule == "adamw" else {})


def _dion_state(group: ToolState, state: ToolState) -> ToolState:
    """Its momentum is a sum of gradients where ours is a mean, and the group counts the steps."""
    if not state:
        return state
    found: dict[str, Any] = {"step": group["step"]}
    if group["algorithm"] in ("muon", "normuon"):
        found["momentum_buffer"] = state["momentum"] * (1 - group["mu"])
        return found | ({_ROWS: state["variance_neuron"]} if "variance_neuron" in state else {})
    found["exp_avg"] = state["momentum"]
    return found | ({"exp_avg_sq": state["variance"]} if "variance" in state else {})


DION = Tool(
    name="dion",
    wrote=lambda group, state: group.get("algorithm") in _RULES and "mu" in group,
    rules=lambda group, state: ("muon",),
    hyper=_dion_hyper,
    moments=_moments,
    state=_dion_state,
    rule_of=lambda group: _RULES[group["algorithm"]],
)
