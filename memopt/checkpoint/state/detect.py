"""From whatever a path or a dictionary is to the optimizer state in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from memopt.checkpoint.importers import dcp, deepspeed, read_state_dict, safe_unpickle
from memopt.checkpoint.state.saved import Source
from memopt.untrusted.text import printable

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
    content = safe_unpickle.unpickled(path)
    for key in _place(content, path):
        content = content[key]
    return read_state_dict(content, str(path), rule)


def _place(content: Any, path: Path) -> tuple[Any, ...]:
    """The keys under which the optimizer's dictionary is, one in the other; none where the content is it."""
    if isinstance(content, Mapping):
        if "param_groups" in content:
            return ()
        key = next((key for key in _KEYS if key in content), None)
        if key is None:
            return ()  # what it lacks is said by whoever reads it
        inside = content[key]
        if isinstance(inside, list):
            if len(inside) != 1:
                raise ValueError(
                    f"{printable(str(path))} holds the states of {len(inside)} optimizers under {key!r}, and one is "
                    "read; a resumed run converts them all by itself (load_state_dict)"
                )
            return (key, 0) if isinstance(inside[0], Mapping) else _refuse(inside[0], path)
        return (key,) if isinstance(inside, Mapping) else _refuse(inside, path)
    _refuse(content, path)


def _refuse(content: Any, path: Path) -> NoReturn:
    raise ValueError(f"{printable(str(path))} holds a {type(content).__name__}, not an optimizer's state_dict")


def surroundings(path: Path) -> Callable[[dict[str, Any]], Any] | None:
    """What the content of a file that ``torch.save`` wrote is with another optimizer's dictionary in the place of its
    own; None where that is all there is. Tensors are mapped.

    Raises ValueError for content that torch does not read with ``weights_only``.
    """
    place = _place(safe_unpickle.unpickled(path), path)
    if not place:
        return None
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of whatever kind: the file says which of torch's functions is called with what
        raise ValueError(
            f"what {printable(str(path))} has beside the optimizer cannot be written again, for torch.load does not "
            f"read it with weights_only=True ({printable(str(error), 300)})"
        ) from error

    def replaced(state_dict: dict[str, Any]) -> Any:
        *outer, last = place
        owner = content
        for key in outer:
            owner = owner[key]
        owner[last] = state_dict
        return content

    return replaced
