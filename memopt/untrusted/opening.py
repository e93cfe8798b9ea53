"""Files opened to be read: regular ones only, their size known before the first byte."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from memopt.untrusted import Refused
from memopt.untrusted.text import printable

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: str | Path) -> io.FileIO:
    """``path`` for reading, unbuffered. Raises :class:`Refused` for what is no regular file (a pipe would wait for
    ever, a device has no end), before it is opened, and OSError where it cannot be."""
    _refuse(os.stat(path).st_mode, path)
    file = io.FileIO(path, opener=lambda name, _: os.open(name, _FLAGS))
    try:
        _refuse(os.fstat(file.fileno()).st_mode, path)  # it may be another by now
    except BaseException:
        file.close()
        raise
    return file


def size_of(file: io.FileIO) -> int:
    return os.fstat(file.fileno()).st_size


def read_file(path: str | Path, most: int, what: str = "such a file") -> bytes:
    """All of a regular file of up to ``most`` bytes. Raises :class:`Refused` for a longer one."""
    with open_regular(path) as file:
        size = size_of(file)
        if size > most:
            raise Refused(f"{printable(str(path))} has {size:,} bytes; {what} has at most {most:,}")
        return read_exactly(file, size)


def read_exactly(file: io.FileIO | io.BytesIO, nbytes: int) -> bytes:
    """Up to ``nbytes`` bytes from here: fewer only where the file ends."""
    parts = []
    while nbytes:
        part = file.read(min(nbytes, 2**30))
        if not part:
            break
        parts.append(part)
        nbytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _refuse(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise Refused(f"{printable(str(path))} is {kind}, and a file is read")
