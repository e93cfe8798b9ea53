"""torch.optim, in a file or in a folder of torch.distributed.checkpoint."""

from __future__ import annotations

import warnings
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memopt.checkpoint.conversion.converted_source import Zeros
from memopt.checkpoint.exporters.base import Exported, Exporter, ExportPlan, ToolDict, counted
from memopt.checkpoint.io.checkpoint_dir import sync_directory
from memopt.checkpoint.state.saved import Record, SavedGroup, Source
from memopt.checkpoint.tensorfile import Progress
from memopt.spec import OptimSpec

if TYPE_CHECKING:
    from memopt.checkpoint.opened import Checkpoint

#: Rules that torch.optim has, with the hyperparameters of ours that it does not have there.
RULES: dict[str, tuple[str, ...]] = {
    "adam": ("nesterov", "cautious"),
    "adamw": ("nesterov", "cautious"),
    "radam": ("nesterov", "cautious"),
    "sgd": ("cautious",),
    "rmsprop": ("cautious",),
    "muon": ("maximize", "ns_dtype", "beta2", "split_rows", "cautious"),
    "adafactor": ("beta1", "scale_parameter", "relative_step", "warmup_init", "convention", "cautious"),
}
#: Those of Muon's that make another step where they are on.
_MEANT = ("maximize", "beta2", "split_rows")
#: What tells torch's Adam and AdamW apart.
OWN = {"adam": {"decoupled_weight_decay": False}, "adamw": {"decoupled_weight_decay": True}}
_FACTORS = {"exp_avg_sq.row": "row_var", "exp_avg_sq.col": "col_var", "exp_avg_sq": "variance"}


def _plan(source: Source) -> ExportPlan:
    rule = source.spec.rule
    if rule not in RULES or (rule == "adafactor" and not all(map(_is_torchs, source.groups))):
        raise ValueError(f"torch.optim has no {rule} with these hyperparameters; it has {', '.join(RULES)}")

    others = [name for group in source.groups for name in group.names if source.rule_of(name).name != rule]
    if others:
        raise ValueError(
            f"an optimizer of torch.optim has one rule, and this state has {len(others)} parameters of another than "
            f"{rule}: {', '.join(others[:3])}; convert it to a spec of one rule first"
        )
    for name in set(RULES[rule]) & set(_MEANT):
        if any(group.hyper.get(name) for group in source.groups):
            raise ValueError(f"torch.optim's {rule} has no {name}")
    scaled = {group.hyper.get("adjust_lr_fn") for group in source.groups} - {"original", "match_rms_adamw"}
    if rule == "muon" and scaled:
        raise ValueError(f"torch.optim.Muon has no adjust_lr_fn={scaled.pop()!r}")

    def state(record: Record, parts: ToolDict) -> ToolDict:
        names = _FACTORS if rule == "adafactor" else {}
        counts = rule not in ("sgd", "muon")
        return {names.get(key, key): value for key, value in parts.items() if counts or key != "step"}

    fmt = "factored" if rule == "adafactor" else "32bit"
    return ExportPlan(OptimSpec(rule=rule, format=fmt), lambda h: group(rule, h), state)


def _is_torchs(group: SavedGroup) -> bool:
    h = group.hyper
    return h["convention"] == "torch" and h["beta1"] is None and bool(h["scale_parameter"])


def group(rule: str, h: ToolDict) -> ToolDict:
    """torch's param group of our hyperparameters."""
    return {k: v for k, v in h.items() if k not in (*RULES[rule], "rule")} | OWN.get(rule, {})


def _plan_dcp(source: Source) -> ExportPlan:
    """``get_optimizer_state_dict`` has every key of torch's group, and ``dcp.load`` asks for every key."""
    plan = _plan(source)
    own = next(kind for name, kind in vars(torch.optim).items() if name.lower() == plan.spec.rule)
    defaults = own([torch.zeros(1)], lr=0.0).defaults
    return plan._replace(group=lambda h: {**defaults, **plan.group(h)})


def _write_dcp(exported: Exported, path: Path, zeros: Zeros, checkpoint: Checkpoint | None, progress: Progress) -> None:
    from torch.distributed.checkpoint import state_dict_saver as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    state = {"optimizer": exported.state_dict(counted(zeros, progress))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # one process is what is meant
        if "no_dist" in signature(dcp.save).parameters:
            dcp.save(state, checkpoint_id=path, no_dist=True)
        else:  # torch 2.6, where only the older function can be told so
            warnings.filterwarnings("ignore", "`save_state_dict` is deprecated", FutureWarning)
            dcp.save_state_dict(state, FileSystemWriter(path), no_dist=True)
    sync_directory(path)


TORCH = Exporter(_plan)
DCP = Exporter(_plan_dcp, _write_dcp, named=True, folder=True)
