"""torch.amp.GradScaler: what it hands to an optimizer whose step takes the scale, where no plan takes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unscale(found_inf: Tensor | None, grad_scale: Tensor | None, gradients: Sequence[tuple[str, Tensor]]) -> bool:
    """Whether the scaler found a NaN or an Inf; otherwise gradients it has not unscaled are, in place.

    It sets ``found_inf`` and, unless ``unscale_`` was called, ``grad_scale``, and takes both away after the step.
    """
    if found_inf is not None and bool(found_inf):
        return True
    if grad_scale is not None and gradients:
        inverse = grad_scale.double().reciprocal().float()
        for device in {g.device for _, g in gradients}:
            torch._foreach_mul_([g for _, g in gradients if g.device == device], inverse.to(device))
    return False
