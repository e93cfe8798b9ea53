"""Files of other tools, read without executing what they say.

Some name classes of their tool. Those that only carry numbers stand here as classes without any behaviour, so the tool
need not be installed and none of its code runs; a file that names anything else is refused. How they are read:
:mod:`memopt.untrusted`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from memopt.checkpoint.tensorfile import DTYPES
from memopt.untrusted import Refused, torchfiles
from memopt.untrusted.graphs import Inert
from memopt.untrusted.pickle_machine import Call
from memopt.untrusted.pickles import inert_classes, read_pickle
from memopt.untrusted.torch_rebuild import Subclass


def _stage(number: Any) -> int:
    if type(number) is not int:
        raise Refused("a stage of ZeRO that is no number")
    return number


def _member(owner: Any, name: Any = None, *more: Any) -> Inert:
    """A value of an enumeration, which Python 3.11 writes as ``getattr(class, name)``; nothing else is looked up."""
    if not (isinstance(owner, type) and issubclass(owner, Inert) and isinstance(name, str)) or more:
        raise Refused("it names builtins.getattr")
    return owner(name)


def _size(numbers: Any = ()) -> tuple[Any, ...]:
    return tuple(numbers) if isinstance(numbers, (list, tuple)) else ()


#: Tensor subclasses of torchao's, by their names: the tensors that one is made of.
TORCHAO = {name: type(name, (Subclass,), {}) for name in ("OptimState8bit", "OptimState4bit", "OptimStateFp8")}
#: Classes that files of other tools name beside torch's own.
CLASSES: dict[str, Any] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Inert,
    "deepspeed.runtime.zero.config.ZeroStageEnum": Call(_stage),
    "deepspeed.utils.tensor_fragment.fragment_address": Inert,
    **{
        f"torchao.{package}.subclass_{bits}.{name}": TORCHAO[name]
        for package in ("optim", "prototype.low_bit_optim")
        for bits, name in (("8bit", "OptimState8bit"), ("4bit", "OptimState4bit"), ("fp8", "OptimStateFp8"))
    },
}
_TREE: dict[str, Any] = {
    **{f"torch.{name}": getattr(torch, name) for name in DTYPES.values()},
    "torch.Size": Call(_size),
    "builtins.getattr": Call(_member),
}


def unpickled(path: Path) -> Any:
    """A file that ``torch.save`` wrote, mapped: tensors are read when they are needed. Raises ValueError for one that
    is damaged or names a class that is not known to be harmless."""
    return torchfiles.read_torch_file(path, CLASSES)


def unpickled_bytes(content: bytes, origin: str) -> Any:
    """The same, of bytes that ``torch.save`` wrote somewhere within a file."""
    return torchfiles.read_torch_bytes(content, origin, CLASSES)


def tree(content: bytes, modules: tuple[str, ...], origin: str) -> Any:
    """A pickle of plain values. Objects of classes in ``modules`` become :class:`Inert`; raises ValueError for a
    pickle that names anything else."""
    return read_pickle(content, inert_classes(modules, _TREE), origin)
