"""torchao's low-bit Adam and AdamW, whose moments are tensor subclasses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from memopt.checkpoint.foreign.base import State, Tool, plain, stored
from memopt.checkpoint.foreign.gathered import gathered
from memopt.checkpoint.stored import Stored

#: Its classes, and what makes one of the blocks a up to b, flat.
_CLASSES: dict[str, Callable[[Any, int, int], Any]] = {
    "OptimState8bit": lambda v, a, b: _cut(v, 1, a, b, v.qmap, v.signed),
    "OptimState4bit": lambda v, a, b: _cut(v, 2, a, b, v.qmap, v.signed, ((b - a) * v.block_size,)),
    "OptimStateFp8": lambda v, a, b: _cut(v, 1, a, b),
}


def _cut(value: Any, packed: int, first: int, stop: int, *rest: Any) -> Any:
    """Blocks of a state, of which ``packed`` elements share a code."""
    size = value.block_size // packed
    codes = value.codes.reshape(-1)[first * size : stop * size]
    return type(value)(codes, value.scale[first:stop], *rest)


def moments(state: State) -> dict[str, Stored]:
    return {name: _moment(name, v) for name, v in state.items() if name != "step" and isinstance(v, Tensor)}


def _moment(name: str, value: Any) -> Stored:
    kind = type(value).__name__
    if kind == "OptimState8bit" and value.block_size == 256:  # bitsandbytes' code book and blocks
        return stored(name, "dynamic8", tuple(value.shape), {"codes": value.codes, "scales": value.scale}, value.signed)
    if kind not in _CLASSES:
        return plain(name, value)

    def decode(first: int, stop: int) -> Tensor:
        block = value.block_size
        begin, end = first // block, -(-stop // block)
        x: Tensor = _CLASSES[kind](value, begin, end).dequantize().reshape(-1)
        return x[first - begin * block : stop - begin * block]

    return gathered(name, tuple(value.shape), decode, kind, {"codes": value.codes, "scales": value.scale})


TOOL = Tool(
    name="torchao",
    wrote=lambda group, state: any(type(v).__name__ in _CLASSES for v in state.values()),
    # It keeps no note of which of the two it was.
    rules=lambda group, state: ("adamw", "adam"),
    hyper=lambda group, rule: {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")},
    moments=moments,
)
