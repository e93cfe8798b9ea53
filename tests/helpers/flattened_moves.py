"""DeepSpeed's checkpoints on other ranks and at other stages, and fp16."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import Tensor

from tests.helpers import ranks
from tests.helpers.flattened import STEPS, drive, found, started

#: What one number of ranks saves and the next one loads, each at a stage of its own: spec, dtype, groups.
MOVED = [
    ("adamw", "float32", 2),
    ("adamw-8bit", "float32", 1),
    ("adafactor", "float32", 2),
    ("came-8bit", "bfloat16", 1),
]
#: ranks -> who saved what they load, and the stage of each.
PLACES: dict[int, tuple[int | None, list[int]]] = {3: (None, [2, 2, 3, 1]), 2: (3, [3, 3, 1, 2]), 1: (2, [1, 2, 2, 3])}


def run(world: int, folder: str) -> dict[Any, Any]:
    moved(world, folder)
    return {"fp16": in_fp16()} if world == 1 else {}


def moved(world: int, folder: str) -> None:
    """Load what another number of ranks saved at another stage, save it again, and go on."""
    from memopt.integrations.deepspeed_load import load_checkpoint

    before, stages = PLACES[world]
    for i, ((spec, dtype, groups), stage) in enumerate(zip(MOVED, stages, strict=True)):
        engine, _ = started(spec, stage, i % 2 == 0, getattr(torch, dtype), groups)
        if before is None:
            drive(engine, 0, STEPS)
        else:
            _, rest = load_checkpoint(engine, f"{folder}/{i}-{before}", tag="middle")
            assert rest["note"] == before
            assert engine.global_steps == STEPS
        engine.save_checkpoint(f"{folder}/{i}-{world}", tag="middle", client_state={"note": world})
        drive(engine, STEPS, 1)
        engine.save_checkpoint(f"{folder}/{i}-{world}-on", tag="middle")


def in_fp16() -> dict[str, Tensor]:
    """With DeepSpeed's own refusal of fp16 on a CPU turned off, and a scale of the loss."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    engine, optimizer = started("adafactor", 2, dtype=torch.float16)
    drive(engine, 0, STEPS)
    return {name: values for name, (_, _, values, *_) in found(optimizer).items()}


@ranks.once
def saved_in() -> str:
    """Where :func:`moved` saves."""
    return tempfile.mkdtemp()
