"""One file with the state of many parameters: room in it, direct reads and writes, and tensors that are the file."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from memopt.layout.chunks import PAGE
from memopt.placements.stores.mapped_files import map_file, punch
from memopt.untrusted.ownership import open_own

#: File systems that are memory: nothing could leave it.
IN_MEMORY = ("tmpfs", "ramfs")
_SAFE = "Nothing was changed, and the state can still be read: save it, or convert_ it to another placement"
_NEVER_CACHED = getattr(os, "O_DIRECT", 0)


class Arena:
    """``path``, or without one a file in the directory for temporary files that has no name any more.

    Reads and writes go past the page cache (``O_DIRECT``) where the file system lets them; where it does not,
    ``direct`` is False and the system is told after each that it need not keep the pages.
    """

    def __init__(self, path: str | None, what: str) -> None:
        self.path = path
        self.what = what
        directory = os.path.dirname(path) if path else tempfile.gettempdir()
        refuse_memory(directory, what, "directory=" if path else "TMPDIR")
        try:
            if path is None:
                self._file, name = tempfile.mkstemp(prefix="memopt-", suffix=".state")
            else:
                self._file, name = open_own(path, os.O_RDWR | os.O_CREAT), path
            self._direct = _open_direct(name)
            if self._direct is not None and not os.path.samestat(os.fstat(self._direct), os.fstat(self._file)):
                raise OSError(116, "its name leads to another file already")
            if path is None:
                os.unlink(name)
        except OSError as error:
            raise OSError(error.errno, f"{what}: {directory} cannot be written to ({error.strerror})") from error
        self.direct = self._direct is not None
        self.end = -(-os.fstat(self._file).st_size // PAGE) * PAGE

    @property
    def directory(self) -> str:
        return os.path.dirname(self.path) if self.path else tempfile.gettempdir()

    def allocate(self, nbytes: int) -> int:
        """The offset of so many zero bytes, reserved on the disk: a full disk is an error here, not in a step."""
        offset, nbytes = self.end, -(-nbytes // PAGE) * PAGE
        if nbytes:
            try:
                os.posix_fallocate(self._file, offset, nbytes)
            except OSError as error:
                os.ftruncate(self._file, offset)  # what it took before it found out
                where = "give another directory=" if self.path else "set TMPDIR to a directory on a disk with room"
                raise OSError(
                    error.errno,
                    f"{self.what}: cannot reserve {nbytes:,} bytes in {self.directory} ({error.strerror}); {where}",
                ) from error
        self.end += nbytes
        return offset

    def release(self, offset: int, nbytes: int) -> None:
        """The bytes are not needed any more, and nothing is mapped there."""
        if self._file < 0:
            return  # closed: what is not in use is given back when it is opened again
        nbytes = -(-nbytes // PAGE) * PAGE
        if offset + nbytes == self.end:
            os.ftruncate(self._file, offset)
            self.end = offset
        else:
            punch(self._file, offset, nbytes)

    def map(self, offset: int, nbytes: int) -> Any:
        return map_file(self._file, offset, -(-nbytes // PAGE) * PAGE)

    def read(self, view: memoryview, offset: int) -> None:
        """Whole pages at a page's offset into memory at a page's address."""
        descriptor = self._file if self._direct is None else self._direct
        begin, size = offset, len(view)
        while len(view):
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise OSError(0, f"{self.what}: {self.path or 'the file'} ends at byte {offset:,}")
            view, offset = view[count:], offset + count
        if self._direct is None:
            _forget(self._file, begin, size)

    def write(self, view: memoryview, offset: int) -> None:
        """Bytes at any offset, from memory that stands in its page as the offset in its own. Pages that are not written
        whole go through the cache: those beside them may be another chunk's."""
        end = offset + len(view)
        first, last = -(-offset // PAGE) * PAGE, end // PAGE * PAGE
        if self._direct is None or first >= last:
            _write(self._file, view, offset)
            if self._direct is None:
                _forget(self._file, offset, len(view))
            return
        _write(self._file, view[: first - offset], offset)
        _write(self._direct, view[first - offset : last - offset], first)
        _write(self._file, view[last - offset :], last)

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fdatasync(self._file)

    def check(self) -> None:
        """Raise OSError if the file's name does not lead to it any more."""
        if self.path is None:
            return
        try:
            there = os.stat(self.path)
        except OSError as error:
            raise OSError(error.errno, f"{self.what}: {self.path} is gone ({error.strerror}). {_SAFE}") from error
        if not os.path.samestat(there, os.fstat(self._file)):
            raise OSError(0, f"{self.what}: {self.path} was replaced by another file. {_SAFE}")

    def close(self) -> None:
        for descriptor in (self._file, self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._file, self._direct = -1, None


def _open_direct(path: str) -> int | None:
    """A second descriptor that goes past the cache, or None where the file system has none."""
    if not _NEVER_CACHED:
        return None
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | _NEVER_CACHED)
    except OSError:
        return None


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _forget(descriptor: int, offset: int, nbytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def refuse_memory(directory: str, what: str, remedy: str) -> None:
    """Raise RuntimeError for a directory on a file system in memory."""
    import psutil

    path = os.path.realpath(directory)
    mounts = [
        m
        for m in psutil.disk_partitions(all=True)
        if path == m.mountpoint or path.startswith(m.mountpoint.rstrip("/") + "/")
    ]
    mount = max(mounts, key=lambda m: len(m.mountpoint), default=None)
    if mount is not None and mount.fstype in IN_MEMORY:
        raise RuntimeError(
            f"{what}: {directory} is {mount.fstype}, which is memory itself, so nothing could be paged "
            f"out; set {remedy.rstrip('=')} to a directory on a disk"
        )
