"""torch.amp.GradScaler: what it hands to an optimizer whose step takes the scale, where no plan takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memopt.optimizer import Optimizer


def stopped_by_scaler(optimizer: Optimizer, gradients: Sequence[tuple[str, Tensor]]) -> bool:
    """Whether the scaler found a NaN or an Inf; otherwise gradients it has not unscaled are, in place.

    It sets ``found_inf`` and, unless ``unscale_`` was called, ``grad_scale``, and takes both away after the step.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if found_inf is not None and bool(found_inf):
        optimizer._skipped += 1
        return True
    if grad_scale is not None and gradients:
        inverse = grad_scale.double().reciprocal().float()
        for device in {g.device for _, g in gradients}:
            torch._foreach_mul_([g for _, g in gradients if g.device == device], inverse.to(device))
    return False
