"""Fake tensors that know the values of what is small and follows from inputs and constants alone.

A fake tensor has a shape and no elements. Models look at some elements all the same: which tokens are images, how long
each sequence is, whether a mask is full. Those are integers and booleans, and small; beside their fake tensors the real
ones are computed. Which expert a token goes to follows from weights, and is taken to be balanced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from estimators.errors import InputError

#: Elements of a tensor whose values are computed.
MOST_INTEGERS, MOST_FLOATS = 2**22, 2**12
_ATEN = torch.ops.aten
#: Asked of every tensor, several times for each operation.
DEVICE = torch.ops.prim.device.default
_GROUPED = getattr(getattr(_ATEN, "_grouped_mm", None), "default", None)


class Untraceable(InputError):
    """A step that depends on values which fake tensors do not have, or an operation without a shape function."""


class _Value:
    """A real tensor. Views of one tensor share ``alive``, which turns false when something unknown is written into
    any of them."""

    __slots__ = ("alive", "tensor")

    def __init__(self, tensor: torch.Tensor, alive: list[bool]) -> None:
        self.tensor = tensor
        self.alive = alive


def value(t: torch.Tensor) -> torch.Tensor | None:
    """The real tensor beside a fake one, where there is one."""
    if not isinstance(t, FakeTensor):
        return t
    found = t.__dict__.get("_memopt_value")
    if found is None:
        return t.constant
    return found.tensor if found.alive[0] else None


def know(t: torch.Tensor, real: torch.Tensor, alive: list[bool] | None = None) -> None:
    t.__dict__["_memopt_value"] = _Value(real, alive or [True])


def small(t: torch.Tensor) -> bool:
    floats = t.is_floating_point() or t.is_complex()
    return t.numel() <= (MOST_FLOATS if floats else MOST_INTEGERS)


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for one in args:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _tensors(one)


class Values(TorchDispatchMode):
    """Follows values beside ``fake``. ``assumed``: sentences on what was taken to be so without being known."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake
        self.assumed: dict[str, None] = {}
        self._kinds: dict[Any, tuple[bool, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation's result, with its values where they are known."""
        if func is DEVICE:
            return args[0].fake_device
        if func is _GROUPED and args[0].dtype is not torch.bfloat16:
            return _grouped(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            return self._by_values(func, args, kwargs)
        self._follow(func, args, kwargs, out)
        return out

    def _kind(self, func: Any) -> tuple[bool, bool]:
        """Whether it writes into an argument, and whether it is random."""
        if func not in self._kinds:
            random = torch.Tag.nondeterministic_seeded in func.tags
            self._kinds[func] = func._schema.is_mutable, random
        return self._kinds[func]

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        mutates, random = self._kind(func)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        known = not random and all(value(t) is not None for t in given)
        outs = list(_tensors(out if isinstance(out, (list, tuple)) else (out,)))
        if known and outs and all(isinstance(t, FakeTensor) and small(t) for t in outs):
            self._compute(func, args, kwargs, given, outs)
        elif mutates:
            _forget(func, args, kwargs)
        elif func in CHOICES and outs:
            CHOICES[func](args[0], outs, *args[1:], **kwargs)
            self.assumed["what is chosen by score, as a token's experts are, is taken to be spread evenly"] = None

    def _compute(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
        constants: list[Any] = [getattr(t, "constant", None) for t in outs]
        if all(one is not None for one in constants):
            for t, one in zip(outs, constants, strict=True):  # the fake mode knows it until something reads it
                know(t, one)
            return
        try:
            real = self._really(func, args, kwargs)
        except Exception:  # what the real operation refuses, the fake one was allowed: its values are not known
            _forget(func, args, kwargs)
            return
        roots = {
            v.tensor.untyped_storage().data_ptr(): v.alive
            for v in (t.__dict__.get("_memopt_value") for t in given if isinstance(t, FakeTensor))
            if v is not None and v.tensor.numel()
        }
        reals = _tensors(real if isinstance(real, (list, tuple)) else (real,))
        for t, r in zip(outs, reals, strict=True):
            if t.shape == r.shape:
                know(t, r, roots.get(r.untyped_storage().data_ptr()) if r.numel() else None)

    def _really(self, func: Any, args: Any, kwargs: Any) -> Any:
        with _disable_current_modes():
            args, kwargs = tree_map_only(FakeTensor, value, (args, kwargs))
            return func(*args, **{k: "cpu" if k == "device" else v for k, v in kwargs.items()})

    def _by_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What has no shape without values, with them."""
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if func is _ATEN.index.Tensor:
            return func(args[0], [i if i is None else j for i in args[1] for j in self._indices(i)])
        if func is _ATEN.masked_select.default and (mask := value(args[1])) is not None:
            with _disable_current_modes():
                count = int(mask.expand(torch.broadcast_shapes(args[0].shape, mask.shape)).sum())
            return torch.empty(count, dtype=args[0].dtype)
        if all(value(t) is not None for t in given):
            real = self._really(func, args, kwargs)
            return tree_map_only(torch.Tensor, self.faked, real)
        if func is _ATEN._local_scalar_dense.default and not _is_count(args[0]):
            return self._scalar(args[0])
        if func is _ATEN.equal.default:
            self.assumed["two tensors that are compared as a whole are taken to differ"] = None
            return False
        raise Untraceable(f"{func.__name__} needs values that follow from weights or from data")

    def _indices(self, index: Any) -> list[Any]:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        mask = value(index)
        if mask is None:
            raise Untraceable("a mask that follows from weights or from data selects elements")
        with _disable_current_modes():
            found = mask.nonzero().unbind(1)
        return [self.faked(one.contiguous()) for one in found]

    def _scalar(self, t: torch.Tensor) -> Any:
        if t.dtype is torch.bool:
            self.assumed["a condition on values that are not known is taken to be false"] = None
            return False
        self.assumed["a number that follows from weights or from data is taken to be 1"] = None
        return 1.0

    def faked(self, real: torch.Tensor) -> torch.Tensor:
        """A fake tensor like a real one, which knows its values where they are small."""
        with self.fake:
            t = torch.empty_strided(real.size(), real.stride(), dtype=real.dtype, device="cpu")
        if small(real) and not real.is_meta:
            know(t, real)
        return t


def _grouped(a: torch.Tensor, b: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    """torch's shape function is for bfloat16 alone; the operation is not."""
    halves = [torch.empty_strided(t.size(), t.stride(), dtype=torch.bfloat16) for t in (a, b)]
    assert _GROUPED is not None
    out = _GROUPED(*halves, *rest, **named)
    return torch.empty_strided(out.size(), out.stride(), dtype=a.dtype)


def _is_count(t: torch.Tensor) -> bool:
    return not t.is_floating_point() and t.dtype is not torch.bool


def _forget(func: Any, args: Any, kwargs: Any) -> None:
    """Something unknown is written into the arguments that the operation changes."""
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[at] if at < len(args) else kwargs.get(argument.name)
            for t in _tensors((given,)):
                found = t.__dict__.get("_memopt_value")
                if found is not None:
                    found.alive[0] = False


def _spread(t: torch.Tensor, n: int, dim: int) -> None:
    """Indices below ``n``: neighbours along ``dim`` follow each other, rows begin where the row before ended."""
    if not small(t):
        return
    with _disable_current_modes():
        k = t.shape[dim] if t.dim() else 1
        real = (torch.arange(t.numel()) % max(1, n)).to(t.dtype)
        if t.dim():
            moved = [s for i, s in enumerate(t.shape) if i != dim % t.dim()]
            real = real.reshape(*moved, k).movedim(-1, dim).contiguous()
        know(t, real)


def _ordered(t: torch.Tensor, dim: int) -> None:
    if not small(t):
        return
    with _disable_current_modes():
        n = t.shape[dim] if t.dim() else 1
        shape = [n if i == dim % max(1, t.dim()) else 1 for i in range(t.dim())]
        know(t, torch.arange(n).reshape(shape).expand(t.shape).contiguous())


def _topk(x: torch.Tensor, outs: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> None:
    _spread(outs[1], x.shape[dim] if x.dim() else 1, dim)


def _sort(x: torch.Tensor, outs: Any, dim: int = -1, *rest: Any, **named: Any) -> None:
    _ordered(outs[-1], dim)


def _stable_sort(x: torch.Tensor, outs: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> None:
    _ordered(outs[-1], dim)


def _argmax(x: torch.Tensor, outs: Any, dim: int | None = None, keepdim: bool = False) -> None:
    n = x.numel() if dim is None else x.shape[dim]
    _spread(outs[-1], n, dim if keepdim and dim is not None else -1)


#: Operations that return places of something by its size -> what is taken to be returned.
CHOICES: dict[Any, Callable[..., None]] = {
    _ATEN.topk.default: _topk,
    _ATEN.sort.default: _sort,
    _ATEN.sort.stable: _stable_sort,
    _ATEN.argsort.default: _sort,
    _ATEN.argmax.default: _argmax,
    _ATEN.argmin.default: _argmax,
    _ATEN.max.dim: _argmax,
    _ATEN.min.dim: _argmax,
}
