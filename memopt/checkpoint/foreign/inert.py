"""Files of other tools, read without executing what they say.

Some name classes of their tool. Those that only carry numbers stand here as classes without any behaviour, so the tool
need not be installed and none of its code runs; a file that names anything else is refused.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from memopt.checkpoint.tensorfile import DTYPES


class Inert:
    """What an object of another tool carries, and nothing that it does."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


#: Classes that DeepSpeed's checkpoints name. They are looked up by name, so ``Inert`` serves for several.
DEEPSPEED: dict[str, Callable[..., Any]] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Inert,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.utils.tensor_fragment.fragment_address": Inert,
}

_FAILURES = (RuntimeError, ValueError, EOFError, BadZipFile, pickle.UnpicklingError, KeyError, TypeError, OSError)


def load(path: Path) -> Any:
    """A file that ``torch.save`` wrote, mapped: tensors are read when they are needed. Raises ValueError for one that
    is damaged or names a class that is not known to be harmless."""
    allowed: list[Any] = [(stand_in, name) for name, stand_in in DEEPSPEED.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _FAILURES as error:
        raise ValueError(
            f"{path} cannot be read without executing what it says, or is damaged: {_reason(error)}"
        ) from None


def loads(content: bytes, origin: str) -> Any:
    """The same, of bytes that ``torch.save`` wrote somewhere within a file."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except _FAILURES as error:
        raise ValueError(
            f"{origin} cannot be read without executing what it says, or is damaged: {_reason(error)}"
        ) from None


def _reason(error: BaseException) -> str:
    named = re.search(r"GLOBAL (\S+)", str(error))
    return f"it names {named[1]}" if named else str(error).partition("\n")[0]


class _Tree(pickle.Unpickler):
    """Dictionaries, lists, numbers, strings, and :class:`Inert` objects for classes of ``modules``."""

    def __init__(self, content: bytes, modules: tuple[str, ...]) -> None:
        super().__init__(io.BytesIO(content))
        self._modules = modules
        # Classes of this reading alone: nothing that a file says of a class outlives it.
        self._classes: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES.values():
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return _size
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module in self._modules:
            return self._classes.setdefault(f"{module}.{name}", type(name, (Inert,), {}))
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def _member(owner: Any, name: Any = None, *more: Any) -> Inert:
    """A value of an enumeration, which Python 3.11 writes as ``getattr(class, name)``; nothing else is looked up."""
    if not (isinstance(owner, type) and issubclass(owner, Inert) and isinstance(name, str)) or more:
        raise pickle.UnpicklingError("it names builtins.getattr")
    return owner(name)


def _size(numbers: Any = ()) -> tuple[Any, ...]:
    return tuple(numbers)


def tree(content: bytes, modules: tuple[str, ...], origin: str) -> Any:
    """A pickle of plain values. Objects of classes in ``modules`` become :class:`Inert`; raises ValueError for a
    pickle that names anything else, before that is looked up."""
    try:
        return _Tree(content, modules).load()
    except Exception as error:  # a damaged pickle fails in any way, and none of them runs anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{origin} cannot be read without executing what it says, or is damaged: {reason}") from None
