"""torchao's low-bit Adam and AdamW, whose moments are tensor subclasses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from memopt.checkpoint.importers.base import Tool, ToolState, encoded, is_book, plain
from memopt.checkpoint.state.saved import Stored
from memopt.formats.foreign.bitsandbytes import code_book, dynamic8
from memopt.formats.foreign.flat_blocks import FlatBlocks
from memopt.formats.foreign.torchao import book_of_4_bits, torchao4, torchao_fp8

#: Elements of a block; torchao's own are of 128 and 256.
MAX_BLOCK = 65536
#: Its classes, with their encoding and its code book.
_CLASSES: dict[str, tuple[Callable[[int], FlatBlocks], Callable[[bool], Tensor] | None]] = {
    "OptimState8bit": (dynamic8, code_book),
    "OptimState4bit": (torchao4, book_of_4_bits),
    "OptimStateFp8": (torchao_fp8, None),
}


def moments(state: ToolState) -> dict[str, Stored]:
    mine = {name: v for name, v in state.items() if isinstance(v, Tensor) or type(v).__name__ in _CLASSES}
    return {name: _moment(name, v) for name, v in mine.items() if name != "step"}


def _moment(name: str, value: Any) -> Stored:
    kind = type(value).__name__
    if kind not in _CLASSES:
        return plain(name, value)
    fmt, book = _CLASSES[kind]
    signed = None if book is None else bool(value.signed)
    if book is not None and not is_book(value.qmap, book(bool(signed))):
        raise ValueError(f"{name} is not in the code book that torchao 0.18 has for {kind}")
    if type(value.block_size) is not int or not 1 <= value.block_size <= MAX_BLOCK:
        raise ValueError(f"{name} is in blocks of {value.block_size}; a block has 1 to {MAX_BLOCK:,} elements")
    parts = {"codes": value.codes, "scales": value.scale}
    return encoded(name, fmt(value.block_size), tuple(value.shape), parts, signed)


TOOL = Tool(
    name="torchao",
    wrote=lambda group, state: any(type(v).__name__ in _CLASSES for v in state.values()),
    # It keeps no note of which of the two it was.
    rules=lambda group, state: ("adamw", "adam"),
    hyper=lambda group, rule: {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")},
    moments=moments,
)
