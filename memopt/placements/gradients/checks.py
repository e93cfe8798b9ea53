"""What a gradient may be, and which ones are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memopt import kernels
from memopt.layout.steppable import check_steppable
from memopt.placements.gradients.host_grad import on_host

#: What to do with a step whose gradients hold NaN or Inf.
POLICIES = ("skip", "raise", "propagate")


def check_gradient(name: str, p: Tensor) -> Tensor:
    """The gradient of ``p``, in host memory if it went there. Raises RuntimeError for one that no rule can take;
    nothing has been changed yet."""
    g = p.grad
    assert g is not None
    check_steppable(name, p)
    if g.layout is not torch.strided:
        raise RuntimeError(f"{name} has a sparse gradient; memopt takes dense ones (nn.Embedding(sparse=False))")
    if g.shape != p.shape:
        raise RuntimeError(
            f"{name} has a gradient of shape {list(g.shape)} and is itself of shape {list(p.shape)}: call zero_grad() "
            "and backward() again after a parameter has changed its shape; nothing was stepped"
        )
    if not g.is_floating_point():
        raise RuntimeError(f"{name} has a gradient of dtype {g.dtype}; a gradient must be real floating point")
    return on_host(g)


def non_finite(gradients: Sequence[tuple[str, Tensor]]) -> list[str]:
    """The names whose gradient holds a NaN or an Inf. One reduction per tensor, one synchronisation per device."""
    bad, gradients = kernels.non_finite(gradients)
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, g in gradients:
        if g.numel():
            largest = torch.linalg.vector_norm(g, float("inf"))
            by_device.setdefault(g.device, []).append((name, largest.float()))
    for entries in by_device.values():
        finite = torch.isfinite(torch.stack([largest for _, largest in entries]))
        if not bool(finite.all()):
            bad += [name for (name, _), ok in zip(entries, finite.tolist(), strict=True) if not ok]
    return bad
