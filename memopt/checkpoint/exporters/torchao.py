"""torchao's low-bit Adam and AdamW: 8 and 4 bits, and 8-bit floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.param_state import Encoding
from memopt.checkpoint.exporters.base import Exporter, ExportPlan, ToolDict, by_moment, in_blocks
from memopt.checkpoint.state.saved import Record, Source
from memopt.core.extras import require
from memopt.engines.bitsandbytes import BLOCK
from memopt.formats.foreign.bitsandbytes import code_book, dynamic8
from memopt.formats.foreign.flat_blocks import FlatBlocks
from memopt.formats.foreign.torchao import book_of_4_bits, torchao4, torchao_fp8
from memopt.spec import OptimSpec

#: Elements of a block unless its optimizers are told otherwise.
BLOCK_4BIT, BLOCK_FP8 = 128, 256

#: ``make(record, parts, signed)``: a moment as its class.
Make = Callable[[Record, dict[str, Tensor], bool], Any]


def _plan(source: Source, fmt: FlatBlocks, make: Make) -> ExportPlan:
    rule = source.spec.rule
    if rule not in ("adam", "adamw"):
        raise ValueError(f"torchao has no {rule} in low precision; it has adam, adamw")
    require("torchao.optim", "state for torchao")

    def state(record: Record, parts: ToolDict) -> ToolDict:
        moments = by_moment(parts).items()
        made = {name: named[""] if "" in named else make(record, named, name == "exp_avg") for name, named in moments}
        return {"step": parts["step"], **made}

    return ExportPlan(OptimSpec(rule=rule), _group, state, Encoding(in_blocks(fmt, whole=True)))


def _group(h: ToolDict) -> ToolDict:
    own = {key: h[key] for key in ("betas", "eps", "weight_decay", "amsgrad")}
    return {"lr": torch.as_tensor(h["lr"], dtype=torch.float32), **own}


def _8bit(record: Record, parts: dict[str, Tensor], signed: bool) -> Any:
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(parts["codes"], parts["scales"], code_book(signed).clone(), signed)


def _4bit(record: Record, parts: dict[str, Tensor], signed: bool) -> Any:
    from torchao.optim.subclass_4bit import OptimState4bit

    return OptimState4bit(parts["codes"], parts["scales"], book_of_4_bits(signed).clone(), signed, record.shape)


def _fp8(record: Record, parts: dict[str, Tensor], signed: bool) -> Any:
    from torchao.optim.subclass_fp8 import OptimStateFp8

    return OptimStateFp8(parts["codes"], parts["scales"])


TORCHAO = Exporter(lambda source: _plan(source, dynamic8(BLOCK), _8bit))
TORCHAO_4BIT = Exporter(lambda source: _plan(source, torchao4(BLOCK_4BIT), _4bit))
TORCHAO_FP8 = Exporter(lambda source: _plan(source, torchao_fp8(BLOCK_FP8), _fp8))
