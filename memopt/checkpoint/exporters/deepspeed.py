"""DeepSpeed's universal checkpoint, which its engines of ZeRO stages 1 to 3 load at any world size.

    OUT/latest_universal                                        the name of the folder
    OUT/global_step7/mp_rank_00_model_states.pt                 the model, schedulers, counters (stages 1 and 2)
    OUT/global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt  the same without the model (stage 3)
    OUT/global_step7/zero/optimizer_state.pt                    param groups
    OUT/global_step7/zero/PARAMETER/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt

Stages 1 and 2 read ``step.pt`` for each parameter and ``param_groups`` one by one. Stage 3 gives the step under
``optimizer_state_dict`` to all of its sub-groups and the first of the param groups there to all groups. So that step
is a number (a tensor would be one tensor, which every sub-group counts up), and that group has only what all groups
have in common: the engine keeps its own values of the rest.

Source: deepspeed/checkpoint/ds_to_universal.py and universal_checkpoint.py, runtime/base_optimizer.py and
runtime/zero/stage3.py of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.converted_source import Converted, Zeros, in_memory
from memopt.checkpoint.exporters import torch_optim
from memopt.checkpoint.exporters.base import Exported, Exporter, ExportPlan, ToolDict, counted, save_durably
from memopt.checkpoint.io import json_values
from memopt.checkpoint.io.checkpoint_dir import sync_directory
from memopt.checkpoint.state.saved import Record, Source
from memopt.checkpoint.tensorfile import Progress
from memopt.core.rows import Rows
from memopt.masters import master_of
from memopt.spec import OptimSpec
from memopt.untrusted.names import component

if TYPE_CHECKING:
    from memopt.checkpoint.opened import Checkpoint

#: The DeepSpeed whose layout this is; its engines ask for a version.
DS_VERSION = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")


def _plan(source: Source) -> ExportPlan:
    rule = source.spec.rule
    if rule not in ("adam", "adamw") or any(group.hyper["amsgrad"] for group in source.groups):
        raise ValueError(
            f"DeepSpeed's universal checkpoints are of adam and adamw without amsgrad; this is {rule}"
            + " with amsgrad" * (rule in ("adam", "adamw"))
        )
    if not source.named:
        raise ValueError(
            f"{source.origin} has numbers for the names of parameters, and DeepSpeed goes by name: give "
            "memopt.create the model or model.named_parameters()"
        )
    for name in source.records:  # each is a folder
        component(name, f"{source.origin}, a parameter,")
    without = next((name for name, record in source.records.items() if record.weights is None), None)
    if without is not None:
        raise ValueError(
            f"{source.origin} does not have the weight {without}, which DeepSpeed's universal checkpoints "
            "have in fp32: save the model with the optimizer, memopt.save(..., model=model)"
        )
    masters = {record.master.master.name for record in source.records.values() if record.master is not None}
    spec = OptimSpec(rule=rule, master=next(iter(masters), "none"))
    return ExportPlan(spec, lambda h: torch_optim.group(rule, h), check=_step)


def _step(converted: Converted) -> float:
    """The one that all parameters have taken. Raises ValueError where they differ."""
    steps = {float(step): name for name, step in converted.steps().items()}
    if len(steps) > 1:
        told = ", ".join(f"{name} {step:.0f}" for step, name in sorted(steps.items())[:2])
        raise ValueError(
            f"DeepSpeed counts the steps of all parameters together, and these differ ({told}); "
            "say which it is to be with fill={'step': N} (--fill step=N)"
        )
    return next(iter(steps), 0.0)


def _write(exported: Exported, path: Path, zeros: Zeros, checkpoint: Checkpoint | None, progress: Progress) -> None:
    converted = exported.converted
    step = _step(converted)
    folder = path / f"global_step{step:.0f}"
    zero = folder / "zero"
    zero.mkdir(parents=True)
    for name, contents in _parameters(converted, counted(in_memory, progress)):
        (zero / name).mkdir(parents=True)
        for moment, tensor in contents.items():
            save_durably({"param": tensor}, zero / name / f"{moment}.pt")
        save_durably(torch.tensor(step), zero / name / "step.pt")
        sync_directory(zero / name)
        del contents, tensor  # before the next are made
    save_durably(_groups(exported, step), zero / "optimizer_state.pt")
    engine = _engine(converted, step, checkpoint)
    save_durably({"module": _model(converted, zeros, checkpoint), **engine}, folder / "mp_rank_00_model_states.pt")
    save_durably({"module": {}, **engine}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with open(path / "latest_universal", "w") as file:
        file.write(folder.name)
        file.flush()
        os.fsync(file.fileno())
    for directory in (zero, folder, path):
        sync_directory(directory)


def _parameters(converted: Converted, zeros: Zeros) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """``(name, {"fp32": …, "exp_avg": …, "exp_avg_sq": …})``, fp32 [shape], one parameter at a time. Where there is no
    state yet there are zeros, as DeepSpeed has them."""
    spec, records = converted.spec, converted.source.records
    for name, state in converted.states(zeros):
        yield name, {"fp32": _weight(spec, records[name], state), **{m: state[m] for m in MOMENTS}}
        del state  # before the next is made
    for name, record in records.items():
        if not record.stepped:
            moments = {m: zeros("float32", record.shape) for m in MOMENTS}
            yield name, {"fp32": _weight(spec, record, {}), **moments}


def _weight(spec: OptimSpec, record: Record, state: ToolDict) -> Tensor:
    """What the weight and its master stand for."""
    assert record.weights is not None
    p, master = record.weights(Rows.whole(record.shape)), master_of(spec.master, record.dtype)
    return (master.read(p, state[master.key]) if master.key in state else p.float()).clone().view(record.shape)


def _groups(exported: Exported, step: float) -> ToolDict:
    groups, first = [], 0
    for group in exported.converted.groups:
        members = list(range(first, first + len(group.names)))
        first += len(members)
        groups.append({**exported.group(group.hyper), "params": members})
    common = {k: v for k, v in groups[0].items() if all(k in group and group[k] == v for group in groups)}
    everywhere = {"state": {0: {"step": int(step)}}, "param_groups": [{**common, "params": list(range(first))}]}
    return {"ds_version": DS_VERSION, "param_groups": groups, "optimizer_state_dict": everywhere}


def _engine(converted: Converted, step: float, checkpoint: Checkpoint | None) -> ToolDict:
    """What an engine keeps beside its model."""
    records = converted.source.records
    scheduler = checkpoint.body.get("scheduler") if checkpoint is not None else None
    return {
        "param_shapes": [{name: torch.Size(records[name].shape) for name in g.names} for g in converted.groups],
        "lr_scheduler": None if scheduler is None else json_values.decode(scheduler),
        "global_steps": int(step),
        "skipped_steps": converted.source.skipped_steps or 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": DS_VERSION,
    }


def _model(converted: Converted, zeros: Zeros, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The model's ``state_dict()``, or its parameters alone where no checkpoint has the rest."""
    found = {}
    if checkpoint is None:
        for name, record in converted.source.records.items():
            assert record.weights is not None
            found[name] = zeros(record.dtype, record.shape).copy_(record.weights(Rows.whole(record.shape)))
        return found
    for name, spec in checkpoint.model_specs.items():
        found[name] = zeros(spec.dtype, spec.shape)
        checkpoint.read_model(name, Rows.whole(spec.shape), found[name])
    return found | {name: found[first] for name, first in checkpoint.body["model"]["tied"].items()}


DEEPSPEED = Exporter(_plan, _write, folder=True)
