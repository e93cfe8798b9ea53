"""Optimizer state for other tools, one file each. ``EXPORTERS`` are what ``memopt convert --to`` knows beside specs."""

from memopt.checkpoint.exporters.base import Exported, Exporter
from memopt.checkpoint.exporters.bitsandbytes import BITSANDBYTES, BITSANDBYTES_32BIT
from memopt.checkpoint.exporters.deepspeed import DEEPSPEED
from memopt.checkpoint.exporters.flashoptim import FLASHOPTIM
from memopt.checkpoint.exporters.muon import MUON
from memopt.checkpoint.exporters.torch_optim import DCP, TORCH
from memopt.checkpoint.exporters.torchao import TORCHAO, TORCHAO_4BIT, TORCHAO_FP8
from memopt.checkpoint.exporters.transformers_adafactor import TRANSFORMERS

EXPORTERS: dict[str, Exporter] = {
    "torch": TORCH,
    "dcp": DCP,
    "muon": MUON,
    "transformers": TRANSFORMERS,
    "bitsandbytes": BITSANDBYTES,
    "bitsandbytes-32bit": BITSANDBYTES_32BIT,
    "torchao": TORCHAO,
    "torchao-4bit": TORCHAO_4BIT,
    "torchao-fp8": TORCHAO_FP8,
    "flashoptim": FLASHOPTIM,
    "deepspeed": DEEPSPEED,
}

__all__ = ["EXPORTERS", "Exported", "Exporter"]
