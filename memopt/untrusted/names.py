"""Names that stand in files: of parameters, of other files, of folders. None of them is a path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from memopt.untrusted import Refused
from memopt.untrusted.text import shown

#: Bytes of a component of a path on the file systems that are in use.
MAX_COMPONENT = 255
#: Characters of a parameter's name; those of published models have up to about 120.
MAX_NAME = 1000


def component(name: Any, where: str) -> str:
    """``name``, which ``where`` says, as one component of a path. Raises :class:`Refused` for what would lead elsewhere
    (separators, ``..``, a drive), for an empty name and for control characters."""
    name = label(name, where)
    separators = {"/", "\\", os.sep, os.altsep or os.sep, ":"}
    if name in (".", "..") or separators & set(name) or name != name.strip() or len(name.encode()) > MAX_COMPONENT:
        raise Refused(f"{where} has the name {shown(name)}, which is not that of a file in its folder")
    return str(name)


def label(name: Any, where: str) -> str:
    """``name`` as a name of something in a file: text that can be shown. Raises :class:`Refused`."""
    if not isinstance(name, str):
        raise Refused(f"{where} has a name that is {shown(name)}, not text")
    if not name or len(name) > MAX_NAME or not name.isprintable():
        what = "an empty name" if not name else f"the name {shown(name)}"
        raise Refused(f"{where} has {what}; a name has 1 to {MAX_NAME} characters, all of them printable")
    return str(name)


def within(folder: Path, name: Any, where: str) -> Path:
    """The file or folder ``name`` in ``folder``, whether it exists or not. Raises :class:`Refused` for a name that is
    no component, and for a link that leads out of the folder."""
    path = folder / component(name, where)
    if path.is_symlink():
        target, root = _resolved(path), folder.resolve()
        if root not in target.parents and not _of_the_hub(root, target):
            raise Refused(f"{path} is a link that leads out of its folder; name what it leads to, or copy it")
    return path


def _resolved(path: Path) -> Path:
    try:
        target = path.resolve()
        circle = target.is_symlink()  # what Python 3.13 returns for a link to itself
    except (OSError, RuntimeError):  # what Python before it raises
        circle = True
    if circle:
        raise Refused(f"{path} is a link that leads nowhere")
    return target


def _of_the_hub(folder: Path, target: Path) -> bool:
    """The cache of the Hugging Face Hub keeps ``snapshots/REVISION/NAME`` as links to ``blobs/HASH``."""
    return folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
