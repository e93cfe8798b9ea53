"""What a gradient may be, which ones are not finite, how large they are together, and what they are multiplied by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import c_float
from math import inf, isfinite
from weakref import ref

import torch
from torch import Tensor

from memopt import kernels
from memopt.core.hyperparameters import CLIP_EPS
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
    """The names whose gradient holds a NaN or an Inf."""
    return look(gradients)[0]


def look(gradients: Sequence[tuple[str, Tensor]], summed: bool = False) -> tuple[list[str], list[float]]:
    """The names whose gradient holds a NaN or an Inf, and with ``summed`` the sum of squares of each gradient, fp64,
    else nothing. One read of each, one synchronisation per device."""
    bad, sums, rest = kernels.look([g for _, g in gradients], summed)
    by_device: dict[torch.device, list[int]] = {}
    for i in rest:
        if gradients[i][1].numel():
            by_device.setdefault(gradients[i][1].device, []).append(i)
    for places in by_device.values():
        if summed:  # the square of an fp32 number fits into fp64
            norms = [torch.linalg.vector_norm(gradients[i][1], dtype=torch.float64) for i in places]
        else:
            norms = [torch.linalg.vector_norm(gradients[i][1], float("inf")).double() for i in places]
        for i, norm in zip(places, torch.stack(norms).tolist(), strict=True):
            if summed:
                sums[i] = norm * norm
            if not isfinite(norm):
                bad.append(i)
    return [gradients[i][0] for i in sorted(bad)], sums


# What gradients are multiplied by ----------------------------------------------------------------------------------


def rounded(x: float) -> float:
    """``x`` as fp32 holds it."""
    return c_float(x).value


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by, so that theirs is at most ``max_norm``: 1 where it is, and where
    the norm is no number that one could divide by, which is left for the look at NaN and Inf to say."""
    return rounded(max_norm / (norm + CLIP_EPS)) if max_norm < norm + CLIP_EPS < inf else 1.0


# What is known of gradients that somebody has read already ---------------------------------------------------------

#: By identity: who it is, its version, its address. Of the last clipping alone.
_FINITE: dict[int, tuple[ref[Tensor], int, int]] = {}


def note_finite(gradients: Iterable[Tensor]) -> None:
    """All of these were found to be finite, as they are now. Not of tensors that torch keeps no version of."""
    _FINITE.clear()
    for g in gradients:
        if not g.is_inference():
            _FINITE[id(g)] = ref(g), g._version, g.data_ptr()


def seen_finite(gradients: Iterable[Tensor | None]) -> bool:
    """Whether each of these is there, was found to be finite, and was not written to since by what torch knows of."""
    if not _FINITE:
        return False
    for g in gradients:
        seen = None if g is None else _FINITE.get(id(g))
        if g is None or seen is None or seen[0]() is not g or (g._version, g.data_ptr()) != seen[1:]:
            return False
    return True
