"""torchao's low-bit Adam and AdamW, whose moments are tensor subclasses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memopt.checkpoint.foreign.base import State, Tool, decoded, plain, stored
from memopt.checkpoint.stored import Stored

_CLASSES = ("OptimState8bit", "OptimState4bit", "OptimStateFp8")


def moments(state: State) -> dict[str, Stored]:
    return {name: _moment(name, v) for name, v in state.items() if name != "step" and isinstance(v, Tensor)}


def _moment(name: str, value: Any) -> Stored:
    kind = type(value).__name__
    if kind == "OptimState8bit" and value.block_size == 256:  # bitsandbytes' code book and blocks
        return stored(name, "dynamic8", tuple(value.shape), {"codes": value.codes, "scales": value.scale}, value.signed)
    if kind in _CLASSES:
        return decoded(name, tuple(value.shape), lambda: value.dequantize().float())
    return plain(name, value)


TOOL = Tool(
    name="torchao",
    wrote=lambda group, state: any(type(v).__name__ in _CLASSES for v in state.values()),
    # It keeps no note of which of the two it was.
    rules=lambda group, state: ("adamw", "adam"),
    hyper=lambda group, rule: {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")},
    moments=moments,
)
