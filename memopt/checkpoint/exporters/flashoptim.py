"""flashoptim's Adam, AdamW, Lion and SGD in its own codes; corrections of weights where a master keeps some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.param_state import Encoding
from memopt.checkpoint.exporters.base import Exporter, ExportPlan, ToolDict, by_moment, in_blocks
from memopt.checkpoint.importers.flashoptim import CODES, COMPANDED, CORRECTION, CORRECTIONS, SCALES
from memopt.checkpoint.state.saved import Record, Source
from memopt.masters import LOW_PRECISION, MASTERS, Master
from memopt.spec import OptimSpec

#: rule -> the hyperparameters that it saves.
_HYPER = {
    "adam": ("lr", "betas", "eps", "weight_decay"),
    "adamw": ("lr", "betas", "eps", "weight_decay"),
    "lion": ("lr", "betas", "weight_decay"),
    "sgd": ("lr", "momentum", "dampening", "weight_decay"),
}
#: Bytes of a weight with its correction, by what our master keeps: 8 more bits, or all of fp32. Others keep nothing.
_BYTES = {"split": 3, "split16": 4, "fp32": 4, "kahan": 4}


def _plan(source: Source) -> ExportPlan:
    rule, nbytes = source.spec.rule, _BYTES.get(source.spec.master, 0)
    if rule not in _HYPER:
        raise ValueError(f"flashoptim has no {rule}; it has {', '.join(_HYPER)}")
    if any(group.hyper.get("amsgrad") or group.hyper.get("maximize") for group in source.groups):
        raise ValueError("flashoptim has neither amsgrad nor maximize")
    if rule == "sgd" and any(group.hyper["momentum"] == 0 for group in source.groups):
        raise ValueError("flashoptim keeps no state of SGD without momentum: there is nothing to export")

    unknown = next((name for name, record in source.records.items() if not record.dtype), None)
    if unknown is not None:
        raise ValueError(
            f"{source.origin} does not say of which dtype the weight {unknown} is, on which flashoptim's "
            "layout depends; flashoptim also loads what is exported for torch"
        )

    def master(spec: OptimSpec, dtype: str) -> Master:
        return CORRECTIONS[nbytes] if nbytes and dtype in LOW_PRECISION else MASTERS["none"]

    def state(record: Record, parts: ToolDict) -> ToolDict:
        found: ToolDict = {} if rule in ("lion", "sgd") else {"step": parts["step"].to(torch.int64)}
        for name, named in by_moment(parts).items():
            if name == "correction":
                found[CORRECTION] = named[""]
            else:
                found |= {name + CODES: named["codes"], name + SCALES: _scales(named["scales"], record.dtype)}
        return found

    def group(h: ToolDict) -> ToolDict:
        own = {key: h[key] for key in _HYPER[rule]}
        return {**own, "initial_lr": h.get("initial_lr", h["lr"]), "master_bytewidth": nbytes, "quantize": True}

    return ExportPlan(OptimSpec(rule=rule), group, state, Encoding(in_blocks(COMPANDED), master))


def _scales(scales: Tensor, dtype: str) -> Any:
    """Beside bf16 weights they are the same bytes under that name, which torch's cast to it leaves alone."""
    return scales.view(torch.bfloat16) if dtype == "bfloat16" else scales


FLASHOPTIM = Exporter(_plan)
