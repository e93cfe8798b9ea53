"""State for the tools people come from: dictionaries that their ``load_state_dict`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.converted import Converted, Zeros
from memopt.checkpoint.dynamic import code_book
from memopt.checkpoint.mixture import exactly
from memopt.checkpoint.plan import Fill
from memopt.checkpoint.stored import Group, Source
from memopt.engines.bitsandbytes import BLOCK, KERNELS
from memopt.spec import OptimSpec

#: Rules that torch.optim has, with the hyperparameters of ours that it does not have there.
_TORCH: dict[str, tuple[str, ...]] = {
    "adam": (), "adamw": (), "radam": (), "sgd": (), "rmsprop": (),
    "adafactor": ("beta1", "scale_parameter", "relative_step", "warmup_init", "convention"),
}  # fmt: skip
#: What tells torch's Adam and AdamW apart.
_TORCH_OWN = {"adam": {"decoupled_weight_decay": False}, "adamw": {"decoupled_weight_decay": True}}
_TORCH_FACTORS = {"exp_avg_sq.row": "row_var", "exp_avg_sq.col": "col_var", "exp_avg_sq": "variance"}

#: Our names of Adafactor's hyperparameters -> those of transformers.
_TRANSFORMERS = {"d": "clip_threshold", "beta2_decay": "decay_rate"}

State = dict[str, Any]
#: What a tool needs: the spec whose state it can hold, and what makes its state and its group of ours.
Plan = tuple[OptimSpec, Callable[[State], State], Callable[[State], State]]


class Exported:
    """``source`` as ``tool`` would save it. Raises ValueError for what the tool cannot hold; nothing is computed yet.

    ``tool`` is ``torch``, ``dcp`` (the same for torch.distributed.checkpoint, with parameters by name),
    ``transformers`` (Adafactor), ``bitsandbytes`` (8 bits), ``bitsandbytes-32bit`` or ``torchao`` (8 bits). Moments
    become what it keeps: fp32 for torch, factors for Adafactor, the dynamic code book for bitsandbytes and torchao.
    """

    def __init__(self, source: Source, tool: str, fill: Fill | None = None) -> None:
        if tool not in _TOOLS:
            raise ValueError(f"state can be exported to {', '.join(_TOOLS)}, not to {tool!r}")
        spec, self._state, self._group = _TOOLS[tool](source)
        self._converted = Converted(source, spec, fill or {})
        self._named = tool in FOLDERS

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self._converted.layout().values())

    @torch.no_grad()
    def state_dict(self, zeros: Zeros | None = None) -> dict[str, Any]:
        """For the tool's ``load_state_dict``; ``zeros`` may make the tensors elsewhere."""
        groups = self._converted.groups
        names = [name for group in groups for name in group.names]
        numbers: dict[str, Any] = {name: name if self._named else i for i, name in enumerate(names)}
        state = {numbers[name]: self._state(parts) for name, parts in self._converted.states(zeros)}
        members = [{**self._group(group.hyper), "params": [numbers[name] for name in group.names]} for group in groups]
        return {"state": state, "param_groups": members}


def export(source: Source, tool: str, fill: Fill | None = None) -> dict[str, Any]:
    """A ``state_dict`` for ``tool``, see :class:`Exported`."""
    return Exported(source, tool, fill).state_dict()


def _torch(source: Source) -> Plan:
    rule = source.spec.rule
    if rule not in _TORCH or (rule == "adafactor" and not all(map(_is_torchs, source.groups))):
        raise ValueError(f"torch.optim has no {rule} with these hyperparameters; it has {', '.join(_TORCH)}")

    def state(parts: State) -> State:
        names = _TORCH_FACTORS if rule == "adafactor" else {}
        return {names.get(key, key): value for key, value in parts.items() if rule != "sgd" or key != "step"}

    def group(h: State) -> State:
        return {k: v for k, v in h.items() if k not in _TORCH[rule]} | _TORCH_OWN.get(rule, {})

    fmt = "factored" if rule == "adafactor" else "32bit"
    return OptimSpec(rule=rule, format=fmt), state, group


def _dcp(source: Source) -> Plan:
    """``get_optimizer_state_dict`` has every key of torch's group, and ``dcp.load`` asks for every key."""
    spec, state, group = _torch(source)
    own = next(kind for name, kind in vars(torch.optim).items() if name.lower() == spec.rule)
    defaults = own([torch.zeros(1)], lr=0.0).defaults
    return spec, state, lambda h: {**defaults, **group(h)}


def _is_torchs(group: Group) -> bool:
    h = group.hyper
    return h["convention"] == "torch" and h["beta1"] is None and bool(h["scale_parameter"])


def _transformers(source: Source) -> Plan:
    if source.spec.rule != "adafactor" or any(g.hyper["convention"] != "transformers" for g in source.groups):
        raise ValueError("transformers has Adafactor in its own convention (convention='transformers'), and no other "
                         f"rule of ours; this is {source.spec.rule}")  # fmt: skip

    def state(parts: State) -> State:
        found: State = {"step": int(parts["step"]), "RMS": 0}
        for key, value in parts.items():
            if key.startswith("exp_avg_sq."):
                found[key.replace(".", "_")] = value.squeeze(-1 if key.endswith("row") else -2)
            elif key != "step":
                found[key] = value
        return found

    def group(h: State) -> State:
        return {_TRANSFORMERS.get(k, k): v for k, v in h.items() if k not in ("convention", "maximize")}

    return OptimSpec(rule="adafactor", format="factored"), state, group


def _torchao(source: Source) -> Plan:
    rule = source.spec.rule
    if rule not in ("adam", "adamw"):
        raise ValueError(f"torchao has no {rule} in low precision; it has adam, adamw")
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ImportError("state for torchao needs the package: pip install torchao") from error

    def state(parts: State) -> State:
        found: State = {"step": parts["step"]}
        for moment in dict.fromkeys(key.partition(".")[0] for key in parts if key != "step"):
            if moment in parts:
                found[moment] = parts[moment]
                continue
            book = code_book(signed=moment == "exp_avg").clone()
            codes, scales = parts[f"{moment}.codes"], parts[f"{moment}.scales"]
            found[moment] = OptimState8bit(codes, scales, book, moment == "exp_avg")
        return found

    def group(h: State) -> State:
        own = {key: h[key] for key in ("betas", "eps", "weight_decay", "amsgrad")}
        return {"lr": torch.as_tensor(h["lr"], dtype=torch.float32), **own}

    # It leaves what has no whole number of blocks in 32 bits.
    ragged = {exactly(name): "32bit" for name, r in source.records.items() if r.stepped and prod(r.shape) % BLOCK}
    return OptimSpec(rule=rule, format="8bit", engine="bitsandbytes", overrides=ragged), state, group


def _bitsandbytes(fmt: str) -> Callable[[Source], Plan]:
    def build(source: Source) -> Plan:
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


_TOOLS: dict[str, Callable[[Source], Plan]] = {
    "torch": _torch,
    "dcp": _dcp,
    "transformers": _transformers,
    "bitsandbytes": _bitsandbytes("8bit"),
    "bitsandbytes-32bit": _bitsandbytes("32bit"),
    "torchao": _torchao,
}
TOOLS = tuple(_TOOLS)
#: Those whose state is a folder.
FOLDERS = ("dcp",)
