"""The state of the random number generators, as plain tensors."""

from __future__ import annotations

import random
import sys
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor


def get() -> dict[str, Tensor]:
    """Of torch (CPU, and each CUDA device in use), of Python, and of numpy where it is loaded."""
    version, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([nan if gauss is None else gauss], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        _, words, position, has_gauss, gauss = numpy.random.get_state()
        states["numpy"] = torch.tensor([*map(int, words), position, has_gauss], dtype=torch.int64)
        states["numpy.gauss"] = torch.tensor([gauss], dtype=torch.float64)
    return states


def check(states: dict[str, Tensor]) -> None:
    """Raise (ValueError, TypeError, KeyError, RuntimeError or OverflowError) for states that the generators do not
    take; none of those that are in use is touched."""
    torch.Generator().set_state(states["torch"])
    version, *words = states["python"].tolist()
    random.Random().setstate((version, tuple(words), None if isnan(float(states["python.gauss"])) else 0.0))
    for name, state in states.items():
        if name.startswith("cuda.") and (state.dtype != torch.uint8 or state.dim() != 1 or state.numel() > 64):
            raise ValueError(f"{name} is {state.dtype} {tuple(state.shape)}")
    if "numpy" in states:
        *words, position, has_gauss = states["numpy"].tolist()
        possible = len(words) == 624 and all(0 <= word < 2**32 for word in words)
        if not possible or not 0 <= position <= 624 or has_gauss not in (0, 1) or states["numpy.gauss"].numel() != 1:
            raise ValueError("numpy's generator has another form")


def set_(states: dict[str, Tensor]) -> None:
    """Put the generators back; those that were not saved, or whose devices are not here, stay as they are."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    gauss = float(states["python.gauss"])
    random.setstate((version, tuple(words), None if isnan(gauss) else gauss))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{i}"], i)
    if "numpy" in states:
        import numpy

        *words, position, has_gauss = states["numpy"].tolist()
        numpy.random.set_state(
            ("MT19937", numpy.array(words, dtype=numpy.uint32), position, has_gauss, float(states["numpy.gauss"]))
        )
