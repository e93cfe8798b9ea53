"""A directory with the state of one rank: lock, file and record; opened, verified and committed."""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from memopt.ledger import ITEMSIZE, Line
from memopt.placements.arena import Arena
from memopt.placements.entry import Entry, Sum
from memopt.placements.journal import Journal, Lock
from memopt.placements.leases import PAGE, Setting

#: The form of the record; another one is refused.
FORMAT = 1
#: Bytes that are read at a time to verify or take checksums.
CHUNK = 16 * 2**20


class Directory:
    """``pending`` are parameters whose state an earlier process left and this one has not asked for yet."""

    def __init__(self, path: str, setting: Setting) -> None:
        self.path = path
        self.spec = setting.spec
        rank = f"{setting.rank:05d}-of-{setting.world_size:05d}"
        self.retired: list[Entry] = []
        self.announced = False
        self._buffer = memoryview(mmap.mmap(-1, PAGE))
        try:
            os.makedirs(path, exist_ok=True)
            _refuse_other_world(path, rank)
            self.lock = Lock(os.path.join(path, f"lock-{rank}"))
        except OSError as error:
            raise OSError(
                error.errno, f"disk: {path} cannot be used as a directory for state ({error.strerror})"
            ) from error
        try:
            self.arena = Arena(os.path.join(path, f"state-{rank}"), "disk")
            try:
                self.journal = Journal(os.path.join(path, f"record-{rank}"))
                self.pending = self._open()
            except BaseException:
                self.arena.close()
                raise
        except BaseException:
            self.lock.close()
            raise

    # Opening ---------------------------------------------------------------------------------------------------

    def _open(self) -> dict[str, dict[str, Any]]:
        """What the last record speaks of, verified; the rest of the file is given back."""
        record = self.journal.read()
        body: dict[str, Any] = json.loads(record) if record else {"format": FORMAT, "parameters": {}}
        if body["format"] != FORMAT:
            raise ValueError(
                f"disk: {self.path} was written by another version of memopt (form {body['format']}, "
                f"this one reads {FORMAT})"
            )
        parameters: dict[str, dict[str, Any]] = body["parameters"]
        used: list[tuple[int, int]] = []
        for name, entry in parameters.items():
            nbytes = _copy_nbytes(entry)
            used += [(begin, begin + nbytes) for begin in entry["begins"]]
            if max(end for _, end in used) > self.arena.end:
                raise ValueError(
                    f"disk: {self.arena.path} is cut short: {name} should be there up to byte "
                    f"{max(end for _, end in used):,}"
                )
            self._verify(name, entry)
        end = 0
        for begin, stop in [*sorted(used), (self.arena.end, self.arena.end)]:
            if begin > end:
                self.arena.release(end, begin - end)
            end = max(end, stop)
        self.written_by = body.get("spec", self.spec)
        return parameters

    def _verify(self, name: str, entry: dict[str, Any]) -> None:
        begin = entry["begins"][entry["copy"]]
        for key, dtype, shape, sums in entry["parts"]:
            nbytes = prod(shape) * ITEMSIZE[dtype]
            covered = 0
            for offset, size, crc in sums:
                if offset != covered or self._crc(begin + offset, size) != crc:
                    raise ValueError(
                        f"disk: the state of {name} in {self.path} is damaged ({key}, bytes {offset:,} to "
                        f"{offset + size:,} are not what was committed); load a checkpoint into another "
                        "directory"
                    )
                covered += size
            if covered != nbytes:
                raise ValueError(f"disk: the record in {self.path} does not cover {key} of {name}")
            begin += -(-nbytes // PAGE) * PAGE

    def _crc(self, offset: int, nbytes: int) -> int:
        if len(self._buffer) < CHUNK + 2 * PAGE:
            self._buffer = memoryview(mmap.mmap(-1, CHUNK + 2 * PAGE))
        crc, end = 0, offset + nbytes
        while offset < end:
            shift, size = offset % PAGE, min(CHUNK, end - offset)
            self.arena.read(self._buffer[: -(-(shift + size) // PAGE) * PAGE], offset - shift)
            crc, offset = zlib.crc32(self._buffer[shift : shift + size], crc), offset + size
        return crc

    def expect(self, lines: Mapping[str, Sequence[Line]]) -> None:
        """Raise ValueError where what is pending is not of these parameters, or of another layout."""
        for name in self.pending:
            if name not in lines:
                raise ValueError(
                    f"disk: {self.path} holds the state of {name!r}, which is none of these parameters; "
                    "give another directory, or remove this one"
                )
            self._check(name, lines[name])

    def _check(self, name: str, lines: Sequence[Line]) -> None:
        there = [(key, dtype, tuple(shape)) for key, dtype, shape, _ in self.pending[name]["parts"]]
        here = [(line.key, line.dtype, line.shape) for line in lines]
        if there != here:
            raise ValueError(
                f"disk: {self.path} holds the state of {name} as {self.written_by!r} keeps it "
                f"({_shown(there)}), and {self.spec!r} keeps {_shown(here)}; go on with the old spec "
                "and convert_, or give another directory"
            )

    def take(self, name: str, lines: Sequence[Line]) -> tuple[Entry, float]:
        """The state of a parameter that is pending."""
        self._check(name, lines)
        saved = self.pending.pop(name)
        entry = Entry(lines, saved["begins"], self.arena, saved["copy"])
        entry.sums = {key: [(a, b, c) for a, b, c in sums] for key, _, _, sums in saved["parts"]}
        return entry, saved["step"]

    def forget(self, name: str) -> None:
        """What an earlier process left of this parameter is not wanted."""
        saved = self.pending.pop(name, None)
        if saved is not None:
            lines = [_line(key, dtype, shape) for key, dtype, shape, _ in saved["parts"]]
            self.retired.append(Entry(lines, saved["begins"], self.arena, saved["copy"]))

    # Committing ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.journal.check()

    def commit(self, entries: Mapping[str, Entry], steps: Mapping[str, float]) -> None:
        """From now on this is the state that a new process finds."""
        self.arena.sync()
        for entry in entries.values():
            if entry.sums is None:  # written as memory, not by a step
                entry.sums = {p.key: self._sums(entry.begins[entry.copy] + p.offset, p.nbytes) for p in entry.parts}
        parameters = {**self.pending, **{name: entry.to_json(steps[name]) for name, entry in entries.items()}}
        record = json.dumps({"format": FORMAT, "spec": self.spec, "parameters": parameters}).encode()
        try:
            self.journal.reserve(len(record))
            self.journal.write(record)
        except OSError as error:
            text = (
                f"disk: the step was made, and could not be committed in {self.path} ({error.strerror}): there the "
                "state is still that of the step before"
            )
            raise OSError(error.errno, text) from error
        for entry in entries.values():
            entry.uncommitted = False
        for entry in self.retired:
            entry.release(self.arena)
        self.retired = []

    def _sums(self, begin: int, nbytes: int) -> list[Sum]:
        return [
            (at, size, self._crc(begin + at, size))
            for at in range(0, nbytes, CHUNK)
            for size in [min(CHUNK, nbytes - at)]
        ]

    def clear(self) -> None:
        """The state has moved elsewhere: a later process must not find what was here."""
        try:
            self.retired, self.pending = [], {}
            self.commit({}, {})
            for path in (self.arena.path, self.journal.path):
                os.unlink(str(path))  # tensors that someone still holds keep their bytes
        except OSError:
            pass  # the directory is gone, and with it the state that was in it

    def close(self) -> None:
        self.arena.close()
        self.journal.close()
        self.lock.close()


def _copy_nbytes(entry: dict[str, Any]) -> int:
    sizes = (prod(shape) * ITEMSIZE[dtype] for _, dtype, shape, _ in entry["parts"])
    return sum(-(-nbytes // PAGE) * PAGE for nbytes in sizes)


def _line(key: str, dtype: str, shape: list[int]) -> Line:
    moment, _, part = key.partition(".")
    return Line("", moment, part, dtype, tuple(shape), prod(shape) * ITEMSIZE[dtype], "disk")


def _shown(parts: Sequence[tuple[str, str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{key} {dtype} {list(shape)}" for key, dtype, shape in parts[:3])


def _refuse_other_world(path: str, rank: str) -> None:
    """Raise RuntimeError for a directory that holds the state of another number of ranks."""
    mine = rank.rpartition("-")[2]
    others = {name.rpartition("-of-")[2] for name in os.listdir(path) if name.startswith("record-")} - {mine}
    if others:
        raise RuntimeError(
            f"disk: {path} holds the state of {int(min(others))} ranks, and there are {int(mine)} now; "
            "save and load a checkpoint to change their number"
        )
