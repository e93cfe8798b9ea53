"""``device``: beside the parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

from memopt.ledger import Line
from memopt.placements.base import Placement

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@final
class Device(Placement):
    """Ordinary memory of the parameter's own device."""

    name = "device"
    summary = "beside the parameter"

    def location(self, device: str) -> str:
        return device

    def allocate(self, lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
        import torch

        return {line.key: torch.zeros(line.shape, dtype=getattr(torch, line.dtype), device=device) for line in lines}

    def explain(self, device: torch.device) -> str:
        return f"state is in the memory of {device}"
