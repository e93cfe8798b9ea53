"""Small tables that the host changes while the device goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.triton.available import capturing


class Uploaded:
    """Numbers on a device; :meth:`set` sends them where they differ from the last ones, and waits for nothing."""

    def __init__(self, dtype: torch.dtype, count: int, device: torch.device) -> None:
        self.tensor = torch.zeros(count, dtype=dtype, device=device)
        self.values: list[Any] = [0] * count
        self.captured = False

    def set(self, values: list[Any]) -> None:
        if capturing(self.tensor.device):
            # A copy from the host would be read again whenever the graph runs, from memory that may be gone by then.
            # Numbers that are there already are written too: a graph steps with those of its capture.
            write_by_value(self.tensor, values)
            self.captured = True
            return
        if values == self.values and not self.captured:  # a graph may have run since, and written its own
            return
        staged = torch.tensor(values, dtype=self.tensor.dtype, pin_memory=self.tensor.device.type == "cuda")
        self.tensor.copy_(staged, non_blocking=True)
        self.values = values


def write_by_value(tensor: Tensor, values: Sequence[Any]) -> None:
    """Fill a vector with numbers that travel as arguments of the launch."""
    tensor.zero_()
    torch._foreach_add_(list(tensor.unbind()), list(values))
