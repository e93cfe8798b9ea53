"""From whatever a path or a dictionary is to the optimizer state in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from memopt.checkpoint.foreign import read_state_dict
from memopt.checkpoint.stored import Source

#: Where training scripts put the optimizer's dictionary in a file of several.
_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states")


def read_file(path: Path, rule: str | None = None) -> Source:
    """A file that ``torch.save`` wrote, with an optimizer's state_dict in it or under one of the usual keys.

    Read with ``weights_only=True`` and mapped, so nothing is executed and tensors are read when they are needed.
    Raises ValueError for a file that cannot be read so.
    """
    try:
        content = _read(path)
    except (RuntimeError, ValueError, EOFError, BadZipFile, pickle.UnpicklingError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read without executing what it says, or is damaged: {reason}") from None
    return read_state_dict(_optimizer_in(content, path), str(path), rule)


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        if "torchao" not in str(error):
            raise
        import torchao.optim  # noqa: F401  # it registers its own tensor classes as harmless

        return torch.load(path, map_location="cpu", weights_only=True)


def _optimizer_in(content: Any, path: Path) -> Mapping[str, Any]:
    if isinstance(content, Mapping) and "param_groups" not in content:
        found = [content[key] for key in _KEYS if key in content]
        content = found[0] if found else content
        content = content[0] if isinstance(content, list) and len(content) == 1 else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an optimizer's state_dict")
    return content
