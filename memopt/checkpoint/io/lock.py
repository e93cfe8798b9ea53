"""The right to write in a folder of checkpoints, which one process has at a time.

Two runs that save into one folder would write into each other's files, and ``keep`` of one would delete the other's. So
the first that saves there locks the folder, and keeps it until its model and optimizer are gone or the process ends,
however it ends. Reading needs no lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import stat
import threading
import weakref
from pathlib import Path
from typing import Any

from memopt.core.user_warning import warn

NAME = ".lock"
#: What a file system says that locks no files.
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Claim:
    """Of this process on one folder. ``users`` are saves under way, ``owners`` how many models and optimizers it is
    kept for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.users = 0
        self.owners: set[int] = set()
        self._file = -1

    def lock(self) -> None:
        """Take the lock, or find that it is held already. Raises OSError where another process has it."""
        path = self.folder / NAME
        if self._file >= 0 and not self._is_there(path):  # somebody removed the folder meanwhile
            self.unlock()
        if self._file < 0:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 200, 0).decode(errors="replace").strip()
            raise OSError(
                f"{self.folder} is written by another run ({_plain(holder) or 'unknown'}), and two runs cannot save "
                "into one folder; give this one a folder of its own, or end the other"
            ) from None
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
            warn(
                f"{self.folder} is on a file system that locks no files ({error.strerror}): see to it that no other "
                "run saves there"
            )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)

    def _is_there(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._file))
        except OSError:
            return False

    def unlock(self) -> None:
        if self._file >= 0:
            self._file, file = -1, self._file
            os.close(file)


_CLAIMS: dict[Path, Claim] = {}
_GUARD = threading.RLock()


def _plain(text: str) -> str:
    return "".join(c for c in text if c.isprintable())


def begin(folder: Path, *owners: Any) -> None:
    """This process writes in the folder, which exists, until :func:`end`, and is the one that may until all ``owners``
    are gone. Raises OSError with a sentence where another process does."""
    folder = folder.resolve()
    with _GUARD:
        claim = _CLAIMS.setdefault(folder, Claim(folder))
        try:
            claim.lock()
        except OSError:
            if not claim.users and not claim.owners:
                claim.unlock()
                del _CLAIMS[folder]
            raise
        claim.users += 1
        for owner in owners:
            if id(owner) not in claim.owners:
                claim.owners.add(id(owner))
                weakref.finalize(owner, release, id(owner)).atexit = False


def end(folder: Path) -> None:
    """A save that was begun there has ended."""
    with _GUARD:
        claim = _CLAIMS.get(folder.resolve())
        if claim is not None:
            claim.users -= 1
            _drop(claim)


def release(owner: int) -> None:
    """What has this ``id()`` saves no more."""
    with _GUARD:
        for claim in list(_CLAIMS.values()):
            claim.owners.discard(owner)
            _drop(claim)


def _drop(claim: Claim) -> None:
    if claim.users <= 0 and not claim.owners:
        _CLAIMS.pop(claim.folder, None)
        claim.unlock()


def _forget() -> None:
    """A child that was forked is another process: the folders are its parent's."""
    for claim in _CLAIMS.values():
        claim.unlock()
    _CLAIMS.clear()


os.register_at_fork(after_in_child=_forget)
