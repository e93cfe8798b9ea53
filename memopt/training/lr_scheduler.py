"""The torch scheduler behind :func:`memopt.schedule`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class FactorLR(LambdaLR):
    """``LambdaLR`` with one factor for every group, and for weight decay too where that is asked for.

    The decay that a group began with stands in it as ``initial_decay``, as torch keeps ``initial_lr``.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float], decay_with_rate: bool) -> None:
        self.decay_with_rate = decay_with_rate
        if decay_with_rate:
            for group in optimizer.param_groups:
                group.setdefault("initial_decay", group["weight_decay"])
        super().__init__(optimizer, factor)

    def step(self, epoch: Any = None) -> None:
        super().step(epoch)
        if self.decay_with_rate:
            for group, factor in zip(self.optimizer.param_groups, self.lr_lambdas, strict=True):
                group["weight_decay"] = group["initial_decay"] * factor(self.last_epoch)
