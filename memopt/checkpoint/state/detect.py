"""From whatever a path or a dictionary is to the optimizer state in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memopt.checkpoint.importers import dcp, deepspeed, read_state_dict, safe_unpickle
from memopt.checkpoint.state.saved import Source

#: Tools that write folders: ``find(path)`` is the one that path means, or None.
FOLDERS = (deepspeed, dcp)
#: Where training scripts put the optimizer's dictionary in a file of several.
_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states")


def is_foreign(path: Path) -> bool:
    """Whether another tool wrote the file or folder."""
    return path.is_file() or any(tool.find(path) is not None for tool in FOLDERS)


def read_path(path: Path, rule: str | None = None) -> Source:
    """Another tool's file or folder."""
    if path.is_file():
        return read_file(path, rule)
    for tool in FOLDERS:
        found = tool.find(path)
        if found is not None:
            source: Source = tool.read(found, rule)
            return source
    raise FileNotFoundError(f"there is no optimizer state of another tool in {path}")


def read_file(path: Path, rule: str | None = None) -> Source:
    """A file that ``torch.save`` wrote, with an optimizer's state_dict in it or under one of the usual keys.

    Raises ValueError for a file that cannot be read without executing what it says.
    """
    return read_state_dict(_optimizer_in(safe_unpickle.load(path), path), str(path), rule)


def _optimizer_in(content: Any, path: Path) -> Mapping[str, Any]:
    if isinstance(content, Mapping) and "param_groups" not in content:
        found = [content[key] for key in _KEYS if key in content]
        content = found[0] if found else content
        content = content[0] if isinstance(content, list) and len(content) == 1 else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an optimizer's state_dict")
    return content
