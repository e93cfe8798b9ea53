"""A folder of checkpoints: how one is committed, found and thrown away.

A checkpoint is written under a name that begins with a dot, made durable, and renamed; the rename is the commit. What
is thrown away is renamed first, so that no half of a checkpoint ever has a checkpoint's name.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from memopt.untrusted.names import within

MANIFEST = "manifest.json"
_NAME = re.compile(r"([0-9]{8})-step([0-9]+)")
WRITING, REMOVING = ".writing-", ".removing-"


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints, oldest first."""
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()) if folder.is_dir() else []


def find(path: Path) -> Path:
    """The checkpoint that ``path`` is, or the newest in it. Raises FileNotFoundError."""
    if (path / MANIFEST).is_file():
        return path
    found = checkpoints(path)
    if not found and _NAME.fullmatch(path.name) and path.is_dir():
        return path  # one that has lost its manifest
    if not found:
        raise FileNotFoundError(f"there is no checkpoint in {path}")
    return within(path, found[-1].name, str(path))


def next_name(folder: Path, step: int) -> str:
    """Names sort in the order of commits; the step is for people."""
    found = checkpoints(folder)
    serial = int(found[-1].name[:8]) + 1 if found else 1
    return f"{serial:08d}-step{step}"


def begin(folder: Path, name: str) -> Path:
    """An empty directory to write in; what interrupted saves left behind is removed. The folder exists, and is this
    process's (:mod:`memopt.checkpoint.io.lock`)."""
    for left in [*folder.glob(WRITING + "*"), *folder.glob(REMOVING + "*")]:
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder / (WRITING + name)
    temporary.mkdir()
    return temporary


def commit(temporary: Path) -> Path:
    """Give the directory its name, durably."""
    folder = temporary.parent
    final = folder / temporary.name.removeprefix(WRITING)
    sync_directory(temporary)
    os.rename(temporary, final)
    sync_directory(folder)
    return final


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
