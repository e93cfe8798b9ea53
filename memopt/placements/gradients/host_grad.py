"""What stands in ``p.grad`` for a gradient that is in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from memopt.partitions.dtensor import is_dtensor

aten = torch.ops.aten


class Gradient(Protocol):
    """A gradient in host memory, or on its way there."""

    name: str

    def here(self, asked: HostGradient) -> Tensor:
        """All of it, when it has come. Raises RuntimeError where ``asked`` stood for an earlier one."""

    def add(self, asked: HostGradient, more: Tensor) -> None:
        """Add another gradient, from the device, when that has come."""


class HostGradient(Tensor):
    """A tensor without memory: shape, dtype and device of the gradient, which is on the host. It is what ``p.grad`` is,
    so that everybody sees whether there is a gradient, and whoever sets it to None drops it.

    A norm, scaling, clamping, zeroing, copying and what torch.amp.GradScaler does to gradients are done on the host;
    a further backward pass adds there. Anything else raises with the reason: it is never silently done to nothing.
    This is no state and is never saved.
    """

    gradient: Gradient
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, gradient: Gradient, like: Tensor) -> HostGradient:
        made: HostGradient = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        made.gradient = gradient
        return made

    def on_host(self) -> Tensor:
        """The gradient, in host memory; what is written into it is what the step sees."""
        return self.gradient.here(self)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<gradient of {self.gradient.name}, {self.dtype} {tuple(self.shape)}, in host memory: .on_host()>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"the gradient of {self.gradient.name} is in host memory and is not saved or copied with p.grad"
            "; use p.grad.on_host()"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__reduce_ex__(2)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            return _unscale(func, *args)
        if func in _OF_LISTS:
            return _each(func, *args, **kwargs)
        act = _ACTS.get(func)
        if act is None or not isinstance(args[0], HostGradient) or any(isinstance(x, HostGradient) for x in args[1:]):
            named = next(
                x for x in (*args, *kwargs.values(), *_listed(args)) if isinstance(x, HostGradient)
            ).gradient.name
            raise RuntimeError(
                f"{func} cannot be done to the gradient of {named}: it is in host memory "
                "(offload_gradients=True); p.grad.on_host() is the tensor there"
            )
        return act(func, *args, **kwargs)


def on_host(g: Tensor) -> Tensor:
    """The tensor that holds a gradient's numbers: itself, unless it is in host memory."""
    return g.on_host() if isinstance(g, HostGradient) else g


def local_gradient(p: Tensor) -> Tensor | None:
    """What is here of the gradient of ``p``: of a DTensor's its local tensor, as it stands there."""
    g: Any = p.grad
    found: Tensor | None = g._local_tensor if is_dtensor(g) else g
    return found


def replace_local(p: Tensor, g: Tensor) -> None:
    """``g`` in the place of what is here of the gradient of ``p``."""
    whole: Any = p.grad
    if is_dtensor(whole):
        whole._local_tensor = g
    else:
        p.grad = g


def _change(func: Any, host_gradient: HostGradient, *args: Any, **kwargs: Any) -> HostGradient:
    func(host_gradient.on_host(), *(x.cpu() if isinstance(x, Tensor) else x for x in args), **kwargs)
    return host_gradient


def _add(func: Any, host_gradient: HostGradient, more: Any, alpha: float = 1) -> HostGradient:
    """What autograd does with the gradient of a further backward pass."""
    if (
        alpha == 1
        and isinstance(more, Tensor)
        and more.shape == host_gradient.shape
        and more.dtype == host_gradient.dtype
    ):
        host_gradient.gradient.add(host_gradient, more)
        return host_gradient
    return _change(func, host_gradient, more, alpha=alpha)


def _read(func: Any, host_gradient: HostGradient, *args: Any, **kwargs: Any) -> Tensor:
    found: Tensor = func(host_gradient.on_host(), *args, **kwargs)
    return found.to(kwargs.get("device") or host_gradient.device)


def _unscale(func: Any, gradients: list[Tensor], found: Tensor, inverse: Tensor) -> None:
    """Some of the gradients of one device and dtype may be here, others there."""
    host_gradient = [g.on_host() for g in gradients if isinstance(g, HostGradient)]
    there = [g for g in gradients if not isinstance(g, HostGradient)]
    bad = torch.zeros_like(found, device="cpu")
    func(host_gradient, bad, inverse.cpu())
    if there:
        func(there, found, inverse)
    found.copy_(torch.maximum(found, bad.to(found.device)))


def _each(func: Any, gradients: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor] | None:
    """Each by itself, where it is: torch takes the local tensors of DTensors together."""
    found: list[Tensor] = []
    for g in gradients:
        if isinstance(g, HostGradient):
            here = func([g.on_host()], *(x.cpu() if isinstance(x, Tensor) else x for x in args), **kwargs)
        else:
            here = func([g], *args, **kwargs)
        found += [x.to(g.device) for x in here or ()]
    return found or None  # of what changes them in place


def _listed(args: Any) -> list[Any]:
    return [x for arg in args if isinstance(arg, (list, tuple)) for x in arg]


#: What can be done, and how.
_ACTS: dict[Any, Callable[..., Any]] = {
    aten.add_.Tensor: _add,
    **dict.fromkeys(
        (
            aten.mul_.Tensor,
            aten.div_.Tensor,
            aten.zero_.default,
            aten.copy_.default,
            aten.clamp_.default,
            aten.clamp_min_.default,
            aten.clamp_max_.default,
        ),
        _change,
    ),
    **dict.fromkeys((aten.linalg_vector_norm.default, aten.clone.default, aten._to_copy.default), _read),
}
#: What can be done to several at a time.
_OF_LISTS = {
    aten._foreach_norm.Scalar,
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.Tensor,
    aten._foreach_div_.Scalar,
    aten._foreach_div_.Tensor,
    aten._foreach_zero_.default,
    aten._foreach_clamp_min_.Scalar,
    aten._foreach_clamp_max_.Scalar,
}
