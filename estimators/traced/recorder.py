"""What a step allocates and frees, in order: one dispatch mode above the fake tensors, in the place of that which
follows values (it calls it: a mode of its own would be a tenth of the time)."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from estimators.activations.recorded import FREE, GRADIENT, OUTPUT, TAKE, TapeEvent
from estimators.traced.values import DEVICE, Values


def leaves(out: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested tuples, lists and mappings."""
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for one in out:
            yield from leaves(one)
    elif hasattr(out, "values") and callable(out.values):
        for one in out.values():
            yield from leaves(one)
    elif hasattr(out, "__dict__"):
        for one in vars(out).values():
            if isinstance(one, (torch.Tensor, list, tuple, dict)):
                yield from leaves(one)


class Recorder(TorchDispatchMode):
    """Every storage that an operation makes is an event, and another when nothing holds it any more: autograd, a
    Python variable or a module. Storages of ``known`` tensors are no events."""

    def __init__(self, values: Values) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = values
        self.events: list[TapeEvent] = []
        self.slots = 0
        self._there: dict[int, tuple[int, Any]] = {}

    def known(self, tensors: Iterable[torch.Tensor]) -> None:
        for t in tensors:
            storage = t.untyped_storage()
            key = storage._cdata
            self._there[key] = (-1, weakref.ref(storage, partial(self._gone, key, -1)))

    def given(self, tensors: Iterable[torch.Tensor]) -> None:
        """The step's inputs, which are there from its beginning to its end."""
        for t in tensors:
            self._see(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        old = _written(func, args, kwargs)
        out = self.values.call(func, args, kwargs)
        if old is not None:
            self._same(old, out)
        elif isinstance(out, torch.Tensor):
            self._see(out)
        elif isinstance(out, (list, tuple)):
            for t in out:
                if isinstance(t, torch.Tensor):
                    self._see(t)
        return out

    def _same(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """``new`` is, in a real step, in the storage of ``old``."""
        slot, _ = self._there.get(old.untyped_storage()._cdata, (-1, None))
        if slot < 0:
            self._see(new)
            return
        storage = old.untyped_storage()
        self._there[storage._cdata] = (-1, weakref.ref(storage, partial(self._gone, storage._cdata, -1)))
        storage = new.untyped_storage()
        key = storage._cdata
        self._there[key] = (slot, weakref.ref(storage, partial(self._gone, key, slot)))

    def _see(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._there:
            return
        nbytes = storage.nbytes()
        slot = -1
        if nbytes:
            slot, self.slots = self.slots, self.slots + 1
            self.events.append((TAKE, slot, nbytes))
        self._there[key] = (slot, weakref.ref(storage, partial(self._gone, key, slot)))

    def _gone(self, key: int, slot: int, _: Any) -> None:
        self._there.pop(key, None)
        if slot >= 0:
            self.events.append((FREE, slot, 0))

    def slot(self, t: torch.Tensor) -> int:
        """Of a tensor's storage, or -1 where it is not the step's."""
        return self._there.get(t.untyped_storage()._cdata, (-1, None))[0]

    def gradient(self, p: torch.Tensor) -> None:
        """A parameter's gradient is complete: what held it until now as an activation is the gradient."""
        if p.grad is not None:
            self.events.append((GRADIENT, self.slot(p.grad), p.grad.untyped_storage().nbytes()))

    def outputs(self, out: Any, but: torch.Tensor) -> None:
        """Storages that the model returns, but for its loss."""
        for slot in {self.slot(t) for t in leaves(out)} - {-1, self.slot(but)}:
            self.events.append((OUTPUT, slot, 0))


_ADD, _PUT = torch.ops.aten.add.Tensor, torch.ops.aten.index_put.default


def _written(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """What a real step writes into where one under a dispatch mode makes a new tensor: autograd adds a second gradient
    to one that nothing else holds (torch/csrc/autograd/input_buffer.cpp), and puts gradients of an indexed tensor into
    zeros (FunctionsManual.cpp, index_backward)."""
    if func is _ADD and len(args) == 2 and not kwargs:
        a, b = args
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype is b.dtype:
            return a if _of_the_engine() and _alone(a) else None
    elif func is _PUT:
        node = torch._C._current_autograd_node()
        return args[0] if node is not None and node.name() == "IndexBackward0" else None
    return None


def _of_the_engine() -> bool:
    """Whether an operation was called by autograd's engine and not by Python."""
    frame: Any = sys._getframe(3)
    while frame is not None and frame.f_code.co_filename.endswith(("_compile.py", "eval_frame.py")):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def _holders(t: torch.Tensor) -> int:
    return int(torch._C._storage_Use_Count(t.untyped_storage()._cdata))


def _alone(t: torch.Tensor) -> bool:
    """Whether no other tensor has its storage. A tensor of its own says how many holders that is."""
    dense = t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)
    return bool(dense) and _holders(t) <= _holders(torch.empty(1))
