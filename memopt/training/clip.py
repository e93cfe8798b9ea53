"""Clipping of gradients: by global norm wherever the gradients are, and by value.

Clipping of each *update* by its RMS is Adafactor's (Shazeer & Stern 2018) and belongs to rules: ``adafactor`` and
``came`` have it as ``d``, and ``stableadamw`` is AdamW with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import fsum, inf, isfinite
from typing import Any

import torch
from torch import Tensor

from memopt.core.hyperparameters import CLIP_EPS, SpecError
from memopt.placements.gradients.checks import clip_factor, look, note_finite
from memopt.placements.gradients.host_grad import HostGradient, on_host
from memopt.placements.gradients.prefetch import scaled


@torch.no_grad()
def clip_grad_norm_(what: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all gradients by ``min(1, max_norm / norm)`` and return ``norm``, fp32 [], of all of them together::

        norm = (sum over every element of every gradient of |g|^norm_type)^(1 / norm_type)      (inf: the largest |g|)

    Gradients may be ordinary tensors (every rank has
    the same ones, as under DistributedDataParallel and ``/zero1``: nothing is communicated), DTensors cut along any
    dimensions of any mesh (FSDP2, tensor parallelism: one number is summed over the ranks that hold other parts, and
    replicas are counted once), and on several devices at a time (offloaded). Norms are taken in fp32 (of fp64
    gradients in fp64) where the gradients lie and gradients are scaled in place: nothing of their size is allocated.

    A norm that is NaN or infinite leaves the gradients as they are, so that what the optimizer says of them
    (``nonfinite``) names the parameters where it began. torch.nn.utils.clip_grad_norm_ makes all of them NaN.

    Args:
        what: An optimizer (any of torch.optim's), a model, a parameter or an iterable of parameters.
        max_norm: The largest norm that is left as it is, > 0.
        norm_type: The p of the norm, > 0; ``math.inf`` for the largest element.

    Returns:
        The norm before clipping, fp32 [], on the first gradient's device; 0 without gradients.

    Raises:
        SpecError: for a number that is not allowed, a sparse gradient, and a DTensor whose sum is still pending.
        RuntimeError: for an optimizer that steps in ``backward()``; its ``release_gradients`` takes ``max_norm``.

    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([w], max_norm=1.0), w.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    _check("max_norm", max_norm)
    gradients = list(_gradients(what))
    norm = _norm(gradients, norm_type)
    parts = [local_part(g) for g in gradients]
    if norm.is_cpu:
        scale = clip_factor(float(norm), max_norm)
        if scale != 1:  # elsewhere to know it would cost a synchronisation
            for device, tensors in _by_device(parts).items():
                torch._foreach_mul_(tensors, torch.tensor(scale, device=device))  # a plain number would be rounded
            scaled(gradients)
        if isfinite(norm):
            note_finite(parts)  # the step need not look again
        return norm
    factor = (max_norm / (norm.double() + CLIP_EPS)).clamp(max=1.0)
    factor = factor.where(norm.isfinite(), 1.0).float()
    for device, tensors in _by_device(parts).items():
        torch._foreach_mul_(tensors, factor.to(device))
    scaled(gradients)
    return norm


@torch.no_grad()
def clip_grad_value_(what: Any, max_value: float) -> None:
    """Clamp every element of every gradient to ``[-max_value, max_value]``, in place, wherever it is.

    Args:
        what: An optimizer, a model, a parameter or an iterable of parameters.
        max_value: The bound, > 0. NaN stays NaN.

    Raises:
        SpecError: for a bound that is not allowed and for a sparse gradient.
        RuntimeError: for an optimizer that steps in ``backward()``.

    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, -0.5])
    >>> clip_grad_value_([w], max_value=1.0); w.grad
    tensor([ 1.0000, -0.5000])
    """
    _check("max_value", max_value)
    for tensors in _by_device(map(local_part, _gradients(what))).values():
        torch._foreach_clamp_min_(tensors, -max_value)
        torch._foreach_clamp_max_(tensors, max_value)


@torch.no_grad()
def grad_norm(what: Any, norm_type: float = 2.0) -> Tensor:
    """The norm that :func:`clip_grad_norm_` would return, without clipping."""
    return _norm(list(_gradients(what)), norm_type)


class PartialNorm:
    """The 2-norm of gradients that come one after the other and do not stay."""

    def __init__(self) -> None:
        self._powers: dict[Any, list[Tensor]] = {}

    @property
    def pending(self) -> bool:
        """Whether something was added since the last :meth:`total`."""
        return bool(self._powers)

    def add(self, g: Tensor) -> None:
        self._powers.setdefault(_cut(g), []).append(_power([local_part(g)], 2.0))

    def total(self) -> Tensor:
        """The norm, fp32 []; the next begins at zero. Collective where gradients are cut over ranks."""
        powers, self._powers = self._powers, {}
        total = _sum([_over_ranks(_sum(some, 2.0), where, 2.0) for where, some in powers.items()], 2.0)
        return total.sqrt().float()


def _norm(gradients: list[Tensor], p: float) -> Tensor:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not p > 0:
        raise SpecError(f"norm_type={p!r} is not allowed; it must be a number > 0, or inf")
    if not gradients:
        return torch.zeros(())
    cut: dict[Any, list[Tensor]] = {}
    for g in gradients:
        cut.setdefault(_cut(g), []).append(local_part(g))
    total = _sum(
        [
            _over_ranks(_sum([_power(part, p) for part in _by_device(tensors).values()], p), where, p)
            for where, tensors in cut.items()
        ],
        p,
    )
    return (total if p == inf else total.sqrt() if p == 2 else total.pow(1 / p)).float()


def _power(tensors: list[Tensor], p: float) -> Tensor:
    """The sum of |x|^p over tensors of one device, fp64 []; the largest |x| for inf."""
    full = [t for t in tensors if t.numel()]
    if not full:
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    if p == 2 and full[0].is_cpu:  # the numbers that a step finds when it clips by itself
        return torch.tensor(fsum(look([("", t) for t in full], True)[1]), dtype=torch.float64)
    if p == 2:
        return torch.stack(torch._foreach_norm(full, p, dtype=torch.float64)).square().sum()
    wide = [t for t in full if t.dtype == torch.float64]  # which torch does not narrow
    rest = [t for t in full if t.dtype != torch.float64]
    found = torch._foreach_norm(wide, p) if wide else ()
    found += torch._foreach_norm(rest, p, dtype=torch.float32) if rest else ()
    norms = torch.stack([norm.double() for norm in found])
    return norms.max() if p == inf else norms.pow(p).sum()


def _sum(powers: list[Tensor], p: float) -> Tensor:
    together = torch.stack([x.to(powers[0].device) for x in powers])
    return together.max() if p == inf else together.sum()


def _over_ranks(power: Tensor, where: Any, p: float) -> Tensor:
    """``power`` summed over the dimensions of a mesh along which the gradients are cut."""
    if where is None:
        return power
    import torch.distributed as dist

    mesh, dims = where
    power = power.to(mesh.device_type)
    for dim in dims:
        dist.all_reduce(power, op=dist.ReduceOp.MAX if p == inf else dist.ReduceOp.SUM, group=mesh.get_group(dim))
    return power


def _gradients(what: Any) -> Iterator[Tensor]:
    for p in _parameters(what):
        if not isinstance(p, Tensor):
            raise SpecError(f"gradients are those of an optimizer, a model or parameters; got a {type(p).__name__}")
        if p.grad is None:
            continue
        if p.grad.layout is not torch.strided:
            raise SpecError(f"a sparse gradient of shape {tuple(p.shape)} cannot be clipped; memopt takes dense ones")
        yield p.grad


def _parameters(what: Any) -> Iterable[Any]:
    if isinstance(what, Tensor):
        return [what]
    if isinstance(what, torch.nn.Module):
        return what.parameters()
    if hasattr(what, "param_groups"):
        if getattr(what, "release", None) is not None:
            raise RuntimeError(
                "the gradients of this optimizer are released in backward(), before there is a norm of "
                "all of them; use release_gradients(model, max_norm=…)"
            )
        return (p for group in what.param_groups for p in group["params"])
    parameters: Iterable[Any] = what
    return parameters


def _cut(g: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh and those of its dimensions along which ``g`` is cut; None for one that is whole here."""
    if type(g) is Tensor or isinstance(g, HostGradient):
        return None
    from torch.distributed.tensor import DTensor

    if not isinstance(g, DTensor):
        return None
    if any(placement.is_partial() for placement in g.placements):
        raise SpecError("a gradient that is a DTensor with a pending sum (Partial) has no norm yet; redistribute it")
    dims = tuple(i for i, placement in enumerate(g.placements) if not placement.is_replicate())
    return (g.device_mesh, dims) if dims else None


def local_part(g: Tensor) -> Tensor:
    """The part that is here, as a view; of a gradient that is in host memory, that."""
    if type(g) is Tensor:
        return g
    if isinstance(g, HostGradient):
        return g.on_host()
    from torch.distributed.tensor import DTensor

    return on_host(g._local_tensor) if isinstance(g, DTensor) else g


def _by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        found.setdefault(t.device, []).append(t)
    return found


def _check(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise SpecError(f"{name}={value!r} is not allowed; it must be a number > 0")
