"""bitsandbytes' optimizers in 8 bits (block-wise) and 32 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.importers.base import Tool, ToolState, is_book, plain, stored
from memopt.checkpoint.state.saved import Stored
from memopt.engines.bitsandbytes import BLOCK
from memopt.formats.foreign.bitsandbytes import code_book

#: Where it hides its tensors from FSDP.
_WRAPPED = "__bnb_optimizer_quant_state__"
#: rule -> names of its first and second moment.
_MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "rmsprop": ("square_avg",),
    "sgd": ("momentum_buffer",),
}


def flat(state: ToolState) -> dict[str, Any]:
    return {**{k: v for k, v in state.items() if k != _WRAPPED}, **state.get(_WRAPPED, {})}


def rules(group: ToolState, state: ToolState) -> tuple[str, ...]:
    """Its Adam decouples weight decay: it is AdamW. Lion, RMSprop and SGD save the same keys."""
    return ("adamw",) if "state2" in flat(state) else ("lion", "rmsprop", "sgd")


def hyper(group: ToolState, rule: str) -> dict[str, Any]:
    first, second = group["betas"][:2]
    own = {
        "adamw": {"betas": (first, second), "eps": group["eps"]},
        "lion": {"betas": (first, second)},
        "rmsprop": {"alpha": first, "eps": group["eps"]},
        "sgd": {"momentum": first},
    }
    return {"lr": group["lr"], "weight_decay": group["weight_decay"], **own[rule]}


def moments(state: ToolState) -> dict[str, Stored]:
    """Named as of AdamW; :func:`renamed` gives those of a rule with one moment its own name."""
    state = flat(state)
    return {name: _moment(state, i, name) for i, name in ((1, "exp_avg"), (2, "exp_avg_sq")) if f"state{i}" in state}


def renamed(found: dict[str, Stored], rule: str) -> dict[str, Stored]:
    return {
        name: s._replace(moment=s.moment._replace(name=name))
        for name, s in zip(_MOMENTS[rule], found.values(), strict=False)
    }


def _moment(state: dict[str, Any], i: int, name: str) -> Stored:
    codes: Tensor = state[f"state{i}"]
    if codes.dtype != torch.uint8:
        return plain(name, codes)
    scales = state.get(f"absmax{i}")
    signed = i == 1
    if scales is None or scales.numel() != -(-codes.numel() // BLOCK):
        raise ValueError(f"this bitsandbytes state is not in blocks of {BLOCK}; only block-wise 8-bit state is read")
    if not is_book(state[f"qmap{i}"], code_book(signed)):
        raise ValueError(f"qmap{i} of this bitsandbytes state is not the dynamic code book")
    return stored(name, "dynamic8", tuple(codes.shape), {"codes": codes, "scales": scales}, signed)


TOOL = Tool(
    name="bitsandbytes",
    wrote=lambda group, state: "state1" in flat(state),
    rules=rules,
    hyper=hyper,
    moments=moments,
)
