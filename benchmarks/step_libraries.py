"""Steps of the libraries around us, of those that are installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch


def others(params: Callable[[], list[torch.nn.Parameter]]) -> dict[str, Callable[[], Any]]:
    """Steps of the libraries that are installed."""
    found: dict[str, Callable[[], Any]] = {
        "torch AdamW foreach": lambda: torch.optim.AdamW(params(), foreach=True),
        "torch Adafactor": lambda: torch.optim.Adafactor(params()),
    }
    try:
        import bitsandbytes as bnb

        found["bitsandbytes AdamW32bit"] = lambda: bnb.optim.AdamW32bit(params())
        found["bitsandbytes AdamW8bit"] = lambda: bnb.optim.AdamW8bit(params())
        found["bitsandbytes Lion8bit"] = lambda: bnb.optim.Lion8bit(params())
    except ImportError:
        pass
    try:
        from torchao import optim as ao

        found["torchao AdamW8bit"] = lambda: ao.AdamW8bit(params())
        found["torchao AdamW4bit"] = lambda: ao.AdamW4bit(params())
    except ImportError:
        pass
    try:
        from transformers.optimization import Adafactor

        found["transformers Adafactor"] = lambda: Adafactor(params())
    except ImportError:
        pass
    try:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        found["DeepSpeedCPUAdam"] = lambda: DeepSpeedCPUAdam(params())
    except ImportError:
        pass
    steps: dict[str, Callable[[], Any]] = {}
    for name, build in found.items():
        try:
            step = build().step
            step()
            steps[name] = step
        except Exception as error:  # a library that cannot build its extension here is left out, and said so
            print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    return steps
