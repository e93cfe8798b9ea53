"""State for the tools people come from: dictionaries that their ``load_state_dict`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.converted import Converted
from memopt.checkpoint.dynamic import code_book
from memopt.checkpoint.plan import Fill
from memopt.checkpoint.stored import Source
from memopt.engines.bitsandbytes import KERNELS
from memopt.spec import OptimSpec

#: Rules that torch.optim has, with the hyperparameters of ours that it does not have there.
_TORCH: dict[str, tuple[str, ...]] = {
    "adam": (), "adamw": (), "radam": (), "sgd": (), "rmsprop": (),
    "adafactor": ("beta1", "scale_parameter", "relative_step", "warmup_init", "convention"),
}  # fmt: skip
#: What tells torch's Adam and AdamW apart.
_TORCH_OWN = {"adam": {"decoupled_weight_decay": False}, "adamw": {"decoupled_weight_decay": True}}
_TORCH_FACTORS = {"exp_avg_sq.row": "row_var", "exp_avg_sq.col": "col_var", "exp_avg_sq": "variance"}

State = dict[str, Any]


@torch.no_grad()
def export(source: Source, tool: str, fill: Fill | None = None) -> dict[str, Any]:
    """A ``state_dict`` for ``tool``: ``torch``, ``bitsandbytes`` (8 bits) or ``bitsandbytes-32bit``.

    Moments become what the tool keeps: fp32 for torch, whose Adafactor keeps factors; the dynamic code book for
    bitsandbytes. Raises ValueError for a rule that the tool does not have.
    """
    if tool not in _TOOLS:
        raise ValueError(f"state can be exported to {', '.join(_TOOLS)}, not to {tool!r}")
    spec, state, group = _TOOLS[tool](source)
    converted = Converted(source, spec, fill or {})
    numbers = {name: i for i, name in enumerate(name for g in source.groups for name in g.names)}
    return {
        "state": {numbers[name]: state(parts) for name, parts in converted.states()},
        "param_groups": [{**group(g.hyper), "params": [numbers[name] for name in g.names]} for g in converted.groups],
    }


def _torch(source: Source) -> tuple[OptimSpec, Callable[[State], State], Callable[[State], State]]:
    rule = source.spec.rule
    hyper = source.groups[0].hyper
    if rule not in _TORCH or (rule == "adafactor" and (hyper["beta1"] is not None or not hyper["scale_parameter"])):
        raise ValueError(f"torch.optim has no {rule} with these hyperparameters; it has {', '.join(_TORCH)}")

    def state(parts: State) -> State:
        names = _TORCH_FACTORS if rule == "adafactor" else {}
        return {names.get(key, key): value for key, value in parts.items() if rule != "sgd" or key != "step"}

    def group(h: State) -> State:
        return {k: v for k, v in h.items() if k not in _TORCH[rule]} | _TORCH_OWN.get(rule, {})

    fmt = "factored" if rule == "adafactor" else "32bit"
    return OptimSpec(rule=rule, format=fmt), state, group


def _bitsandbytes(fmt: str) -> Callable[[Source], tuple[OptimSpec, Any, Any]]:
    def build(source: Source) -> tuple[OptimSpec, Any, Any]:
        rule = source.spec.rule
        if rule not in KERNELS:
            raise ValueError(f"bitsandbytes has no {rule}; it has {', '.join(KERNELS)}")
        return OptimSpec(rule=rule, format=fmt, engine="bitsandbytes"), _bitsandbytes_state, lambda h: _group(rule, h)

    return build


def _bitsandbytes_state(parts: Mapping[str, Tensor]) -> State:
    found: State = {"step": int(parts["step"])}
    moments = list(dict.fromkeys(key.partition(".")[0] for key in parts if key != "step"))
    for i, moment in enumerate(moments, 1):
        if moment in parts:
            found[f"state{i}"] = parts[moment]
        else:
            book = code_book(signed=i == 1)
            found |= {f"state{i}": parts[f"{moment}.codes"], f"absmax{i}": parts[f"{moment}.scales"]}
            found[f"qmap{i}"] = book.clone()
    return found


def _group(rule: str, h: Mapping[str, Any]) -> State:
    betas = {"rmsprop": lambda: (h["alpha"], 0.0), "sgd": lambda: (h["momentum"], 0.0)}
    pair = betas[rule]() if rule in betas else tuple(h["betas"])
    eps, own = h.get("eps", 0.0), {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    return {"lr": float(h["lr"]), "betas": pair, "eps": eps, "weight_decay": h["weight_decay"], **own}


_TOOLS: dict[str, Callable[[Source], tuple[OptimSpec, Any, Any]]] = {
    "torch": _torch,
    "bitsandbytes": _bitsandbytes("8bit"),
    "bitsandbytes-32bit": _bitsandbytes("32bit"),
}
TOOLS = tuple(_TOOLS)
