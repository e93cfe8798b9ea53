"""A record that is replaced as a whole or not at all, and the lock of the directory that it is in."""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from contextlib import suppress

from memopt.layout.chunks import PAGE
from memopt.untrusted.ownership import open_own

_MAGIC = b"memopt02"
#: magic, bytes of an area, number of the record, bytes of it, its CRC-32.
_HEADER = struct.Struct("<8sQQQI")


class Journal:
    """Two areas of a file that was reserved beforehand, written in turn. The record is the one with the higher number
    among those that are whole: a process that dies while it writes, or a disk that fails, leaves the one before.
    ``torn`` says that there is one that is not whole. The lock of the directory must be held."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.torn = False
        self._number = 0
        with suppress(FileNotFoundError):
            os.unlink(_unfinished(path))  # of a process that ended before it had its name
        self._file = open_own(path, os.O_RDWR | os.O_CREAT)
        self._capacity = os.fstat(self._file).st_size // 2 // PAGE * PAGE

    def records(self) -> list[bytes]:
        """The records that are whole, the last one first: the one that counts, and perhaps the one before. None where
        there has never been one. Raises ValueError where none is whole."""
        found: dict[int, bytes] = {}
        written = False
        for area in (0, 1):
            head = os.pread(self._file, _HEADER.size, area * self._capacity) if self._capacity else b""
            if len(head) < _HEADER.size or not any(head):
                continue
            written = True
            magic, capacity, number, nbytes, crc = _HEADER.unpack(head)
            if magic == _MAGIC and capacity != self._capacity:
                raise ValueError(
                    f"{self.path} is damaged: it has areas of {self._capacity:,} bytes, and {capacity:,} were written"
                )
            body = os.pread(self._file, min(nbytes, self._capacity), area * self._capacity + _HEADER.size)
            if magic == _MAGIC and len(body) == nbytes and zlib.crc32(body) == crc:
                found[number] = body
            else:
                self.torn = True
        if written and not found and not self._only_the_first():
            raise ValueError(
                f"{self.path} is damaged: neither of its two records is whole (or another version of memopt wrote it)"
            )
        self._number = max(found, default=0)
        return [found[number] for number in sorted(found, reverse=True)]

    def _only_the_first(self) -> bool:
        """Whether all that was ever written is the beginning of the first record, which speaks of no state."""
        heads = [os.pread(self._file, _HEADER.size, area * self._capacity) for area in (0, 1)]
        return not any(heads[0]) and len(heads[1]) == _HEADER.size and _HEADER.unpack(heads[1])[2] <= 1

    def reserve(self, nbytes: int) -> None:
        """Room for records of so many bytes, so that a full disk is found out now."""
        needed = -(-(nbytes + _HEADER.size) // PAGE) * PAGE
        if needed > self._capacity:
            self._move(2 * needed, self.records()[:1])

    def roll_back(self, record: bytes) -> None:
        """``record``, one of :meth:`records`, counts from now on, and the one after it is gone."""
        self._move(self._capacity, [record])

    def _move(self, capacity: int, records: list[bytes]) -> None:
        """Into a file of other areas, which has the name of this one when it is whole."""
        temporary = _unfinished(self.path)
        descriptor = open_own(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.posix_fallocate(descriptor, 0, 2 * capacity)
            before = self._file, self._capacity
            self._file, self._capacity = descriptor, capacity
            try:
                for record in records:
                    self.write(record)
                if not records:
                    os.fsync(descriptor)
                os.rename(temporary, self.path)
                sync_directory(os.path.dirname(self.path))
            except BaseException:
                self._file, self._capacity = before
                raise
        except BaseException:
            os.close(descriptor)
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        os.close(before[0])

    def write(self, record: bytes) -> None:
        """Replace the record. Everything that it speaks of must be on the disk already."""
        assert len(record) + _HEADER.size <= self._capacity, "reserve() first"
        number = self._number + 1
        head = _HEADER.pack(_MAGIC, self._capacity, number, len(record), zlib.crc32(record))
        text, offset = memoryview(head + record), number % 2 * self._capacity
        while len(text):
            count = os.pwrite(self._file, text, offset)
            text, offset = text[count:], offset + count
        os.fdatasync(self._file)
        self._number = number

    def check(self) -> None:
        """Raise OSError if the file's name does not lead to it any more."""
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except OSError as error:
            raise OSError(error.errno, f"disk: {self.path} is gone ({error.strerror}); nothing was changed") from error
        if not same:
            raise OSError(0, f"disk: {self.path} was replaced by another file; nothing was changed")

    def close(self) -> None:
        os.close(self._file)


def _unfinished(path: str) -> str:
    return f"{path}.new"


def sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """A directory's lock, held until :meth:`close` or the end of the process, however it ends."""

    def __init__(self, path: str) -> None:
        self._file = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip()
            os.close(self._file)
            who = f"process {holder}" if holder.isdecimal() else "another process"
            who = "another optimizer of this process" if holder == str(os.getpid()) else who
            raise RuntimeError(
                f"disk: {os.path.dirname(path)} is in use by {who}; "
                "two optimizers cannot keep their state in one directory"
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._file)
