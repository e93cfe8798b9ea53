"""bitsandbytes' optimizers in 8 and 32 bits."""

from __future__ import annotations

from typing import Any

from memopt.checkpoint.exporters.base import Exporter, ExportPlan, ToolDict, by_moment
from memopt.checkpoint.state.saved import Record, Source
from memopt.engines.bitsandbytes import KERNELS
from memopt.formats.foreign.bitsandbytes import code_book
from memopt.spec import OptimSpec


def _plan(source: Source, fmt: str) -> ExportPlan:
    rule = source.spec.rule
    if rule not in KERNELS:
        raise ValueError(f"bitsandbytes has no {rule}; it has {', '.join(KERNELS)}")
    return ExportPlan(OptimSpec(rule=rule, format=fmt, engine="bitsandbytes"), lambda h: _group(rule, h), _state)


def _state(record: Record, parts: ToolDict) -> ToolDict:
    found: ToolDict = {"step": int(parts["step"])}
    for i, named in enumerate(by_moment(parts).values(), 1):
        if "" in named:
            found[f"state{i}"] = named[""]
        else:
            found |= {f"state{i}": named["codes"], f"absmax{i}": named["scales"]}
            found[f"qmap{i}"] = code_book(signed=i == 1).clone()
    return found


def _group(rule: str, h: ToolDict) -> ToolDict:
    betas: dict[str, Any] = {"rmsprop": lambda: (h["alpha"], 0.0), "sgd": lambda: (h["momentum"], 0.0)}
    pair = betas[rule]() if rule in betas else tuple(h["betas"])
    eps, own = h.get("eps", 0.0), {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    return {"lr": float(h["lr"]), "betas": pair, "eps": eps, "weight_decay": h["weight_decay"], **own}


BITSANDBYTES = Exporter(lambda source: _plan(source, "8bit"))
BITSANDBYTES_32BIT = Exporter(lambda source: _plan(source, "32bit"))
