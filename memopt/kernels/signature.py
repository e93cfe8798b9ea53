"""What many tensors are, compared in one go: type, dtype, device, shape and strides.

torch has the comparison in C++, for the guards of compiled functions: 0.08 microseconds a tensor, where dtype, shape
and contiguity alone take four times that from Python. It is no public interface; where it is missing, or says no for
what makes no difference here (strides of dimensions of one element, a gradient mode), Python compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor


def _guards() -> Any:
    try:
        import torch._C._dynamo.guards as torch_guards

        TensorGuards: Any = torch_guards.TensorGuards
        tensor = torch.zeros(1)
        guards = TensorGuards(tensor, dynamic_dims_sizes=[], dynamic_dims_strides=None)
        return TensorGuards if guards.check(tensor) and not guards.check(tensor.double()) else None
    except Exception:  # of a version in which it is something else
        return None


_GUARDS = _guards()


@final
class Signature:
    """That of these tensors; ``matches`` says whether others, in the same order, are alike."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kinds = [kind_of(x) for x in tensors]
        self._guards = None
        if _GUARDS is not None and tensors:
            self._guards = _GUARDS(*tensors, dynamic_dims_sizes=[], dynamic_dims_strides=None)

    def matches(self, tensors: Sequence[Any]) -> bool:
        if self._guards is not None and self._guards.check(*tensors):
            return True
        same = len(tensors) == len(self._kinds) and all(isinstance(x, Tensor) for x in tensors)
        return same and all(kind_of(x) == kind for x, kind in zip(tensors, self._kinds, strict=True))


def kind_of(x: Tensor) -> tuple[Any, ...]:
    """Type, dtype, device, shape, and strides unless they follow from it."""
    if x.layout is not torch.strided:
        return type(x), x.layout
    return type(x), x.dtype, x.device, x.shape, None if x.is_contiguous() else x.stride()
