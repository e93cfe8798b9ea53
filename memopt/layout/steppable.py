"""Which parameters a rule can step."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.core.hyperparameters import SpecError
from memopt.partitions.dtensor import of_fsdp1

#: Parameters of any other dtype (quantised, complex) are left alone.
STEPPED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_steppable(name: str, p: Tensor) -> None:
    """Raise SpecError for a parameter that no rule can step."""
    if reason := of_fsdp1(name, p):
        raise SpecError(reason)
    if p.dtype not in STEPPED:
        raise SpecError(f"{name} has dtype {p.dtype}; memopt takes float16, bfloat16, float32 and float64 parameters")
    if p.layout is not torch.strided:
        raise SpecError(f"{name} has layout {p.layout}; memopt takes dense parameters")
