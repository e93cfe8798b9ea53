"""Which checkpoints of a folder are whole, and which may go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memopt.checkpoint.io import checkpoint_dir
from memopt.checkpoint.tensorfile import DamagedFile
from memopt.core.user_warning import warn

#: What opens a checkpoint and reads all of it.
Opener = Callable[[Path], Any]
#: Of each file of a checkpoint: name, bytes, when it was changed, and which file it is.
_Signature = tuple[tuple[str, int, int, int], ...]
#: Checkpoints that this process has written or verified, and their files as they were then.
_CHECKED: dict[Path, _Signature] = {}


def _signature(path: Path) -> _Signature:
    with os.scandir(path) as entries:
        found = [(e.name, e.stat(follow_symlinks=False)) for e in entries]
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in found))


def remember(path: Path) -> None:
    """Every byte of this checkpoint has just been written or verified."""
    path = path.resolve()
    _CHECKED[path] = _signature(path)


def damage(path: Path, opened: Opener) -> str | None:
    """What is wrong with a checkpoint, or None: what ``opened(path)`` raises, which reads all of it. Files that this
    process wrote or verified, and that are as they were, are not read again."""
    try:
        if _CHECKED.get(path.resolve()) != _signature(path):
            opened(path).close()
    except (DamagedFile, OSError) as error:
        return str(error)
    except ValueError:  # of a later version: not ours to judge
        return None
    return None


def newest(among: Path, but: Path, opened: Opener) -> Path | None:
    """The newest whole checkpoint of a folder other than ``but``."""
    others = [path for path in checkpoint_dir.checkpoints(among) if path.resolve() != but.resolve()]
    return next((path for path in reversed(others) if damage(path, opened) is None), None)


def prune(new: Path, keep: int, opened: Opener) -> None:
    """Leave ``keep`` checkpoints beside and with ``new``, which was just committed: the damaged go first, then the
    oldest. A damaged one that goes is named in a warning."""
    found = checkpoint_dir.checkpoints(new.parent)
    excess = len(found) - keep
    if excess <= 0:
        return
    wrong = {path: why for path in found if path != new and (why := damage(path, opened)) is not None}
    doomed = [*wrong, *(path for path in found if path not in wrong and path != new)][:excess]
    for path in doomed:
        if path in wrong:
            warn(f"{path} is damaged ({wrong[path]}); it was removed before any that is whole")
        gone = path.with_name(checkpoint_dir.REMOVING + path.name)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
        _CHECKED.pop(path.resolve(), None)
