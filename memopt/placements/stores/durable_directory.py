"""A directory with the state of one rank: lock, file and record; opened, verified and committed."""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from memopt.core.ledger import ITEMSIZE, Line
from memopt.layout.chunks import PAGE, StoreOptions
from memopt.placements.arena import Arena
from memopt.placements.entry import Entry, Sum
from memopt.placements.stores.atomic_record import Journal, Lock, sync_directory
from memopt.placements.stores.record import FORMAT, Commit, commit_of, copy_nbytes, line, refuse_other_world, shown
from memopt.untrusted import laid_out
from memopt.untrusted.documents import parse_json
from memopt.untrusted.ownership import own_directory

#: Bytes that are read at a time to verify or take checksums.
CHUNK = 16 * 2**20


class Directory:
    """``pending`` are parameters whose state an earlier process left and this one has not asked for yet. Of several
    ranks each has files of its own in it. They commit one after the other, so that one that is ended may be a commit
    behind: nothing that the commit before needs is written over until all have made theirs (:meth:`wait`), and
    :meth:`go_on_from` takes all ranks to the last that every one has."""

    def __init__(self, path: str, store_options: StoreOptions) -> None:
        self.path = path
        self.spec = store_options.spec
        rank = f"{store_options.rank:05d}-of-{store_options.world_size:05d}"
        self.retired: list[Entry] = []
        self._unneeded: list[Entry] = []  # by the last commit; the one before it may need them
        self.announced = False
        self.undone = False  # a commit that not every rank had made
        self.number = 0
        self.pending: dict[str, dict[str, Any]] = {}
        self._alone = store_options.world_size == 1
        self._barrier: Callable[[], None] | None = None
        self._ahead = False  # whether another rank may not have made the last commit yet
        self._buffer = memoryview(mmap.mmap(-1, PAGE))
        try:
            own_directory(path)
            refuse_other_world(path, rank)
            self.lock = Lock(os.path.join(path, f"lock-{rank}"))
        except OSError as error:
            raise OSError(
                error.errno, f"disk: {path} cannot be used as a directory for state ({error.strerror})"
            ) from error
        try:
            self.arena = Arena(os.path.join(path, f"state-{rank}"), "disk")
            try:
                self.journal = Journal(os.path.join(path, f"record-{rank}"))
                try:
                    self._open()
                except BaseException:
                    self.journal.close()
                    raise
            except BaseException:
                self.arena.close()
                raise
        except BaseException:
            self.lock.close()
            raise

    # Opening ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """What the last record speaks of, verified; if there are no other ranks, the rest of the file is given back."""
        records = self.journal.records()
        if not records:
            self._begin()
            return
        used = self._take_up(records[0])
        if self._alone:
            self._give_back(used)

    def _take_up(self, record: bytes) -> list[tuple[int, int]]:
        """``pending`` is what this record speaks of; where that is in the file."""
        with laid_out(f"disk: {self.journal.path}", "a record"):
            body = parse_json(record, self.journal.path)
            used = self._read(body)
            self.pending, self.number = body["parameters"], body["number"]
            self.written_by = body.get("spec", self.spec)
            return used

    def _begin(self) -> None:
        """The record of no state, before there is any: from here on, state without a record is state whose record was
        lost."""
        if self.arena.end:
            raise ValueError(
                f"disk: {self.arena.path} holds state, and its record {self.journal.path} is lost, without which "
                "nobody knows what is where. Nothing was changed: put the record back, or give another directory and "
                "load a checkpoint"
            )
        self.commit({}, {})

    def _read(self, body: dict[str, Any]) -> list[tuple[int, int]]:
        """Where the state is that a record speaks of, verified."""
        if body["format"] != FORMAT:
            raise ValueError(
                f"disk: {self.path} was written by another version of memopt (form {body['format']}, "
                f"this one reads {FORMAT})"
            )
        parameters: dict[str, dict[str, Any]] = body["parameters"]
        used: list[tuple[int, int]] = []
        for name, entry in parameters.items():
            nbytes = copy_nbytes(entry)
            used += [(begin, begin + nbytes) for begin in entry["begins"]]
            if max(end for _, end in used) > self.arena.end:
                raise ValueError(
                    f"disk: {self.arena.path} is cut short: {name} should be there up to byte "
                    f"{max(end for _, end in used):,}"
                )
            self._verify(name, entry)
        end = 0
        for begin, stop in sorted(used):
            if begin < end and begin < stop:
                raise ValueError(f"disk: {self.journal.path} is damaged: byte {begin:,} is of two parameters")
            end = max(end, stop)
        return used

    def _give_back(self, used: list[tuple[int, int]]) -> None:
        """The room between what is used."""
        end = 0
        for begin, stop in [*sorted(used), (self.arena.end, self.arena.end)]:
            if begin > end:
                self.arena.release(end, begin - end)
            end = max(end, stop)

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

    @property
    def note(self) -> str:
        """A word where the state is not that of the last record."""
        if self.undone:
            return "; a later step had been committed by some ranks and not by others, and is undone"
        if not self.journal.torn:
            return ""
        return ", by the record before one that is not whole (a process ended while it wrote it, or the disk lost it)"

    # Several ranks ---------------------------------------------------------------------------------------------

    def commits(self) -> list[Commit]:
        """What this rank can go on from, the last first."""
        return [commit for _, commit in self._whole()]

    def _whole(self) -> list[tuple[bytes, Commit]]:
        return [(record, commit) for record in self.journal.records() if (commit := commit_of(record)) is not None]

    def go_on_from(self, commit: Commit, barrier: Callable[[], None]) -> None:
        """All ranks go on from ``commit``; ``barrier`` is where they wait for each other from now on. Raises ValueError
        for state that is not whole any more."""
        record = next(r for r, one in self._whole() if one == commit)
        used = self._take_up(record)
        if record != self.journal.records()[0]:
            self.journal.roll_back(record)
        self._give_back(used)
        self._barrier, self._ahead = barrier, False

    def wait(self) -> None:
        """Before anything is written that was committed once: until all ranks have made the last commit."""
        if not self._ahead:
            return
        if self._barrier is not None:
            self._barrier()
        self._ahead = False
        self._release()

    def _release(self) -> None:
        while self._unneeded:
            self._unneeded.pop().release(self.arena)

    def validate_existing(self, lines: Mapping[str, Sequence[Line]]) -> None:
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
                f"({shown(there)}), and {self.spec!r} keeps {shown(here)}; go on with the old spec "
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
            lines = [line(key, dtype, shape) for key, dtype, shape, _ in saved["parts"]]
            self.retired.append(Entry(lines, saved["begins"], self.arena, saved["copy"]))

    # Committing ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.journal.check()

    def commit(self, entries: Mapping[str, Entry], steps: Mapping[str, float]) -> None:
        """From now on this is the state that a new process finds."""
        self.wait()  # the commit before the last is written over
        self.arena.sync()
        self.number += 1
        for entry in entries.values():
            if entry.sums is None:  # written as memory, not by a step
                entry.sums = {p.key: self._sums(entry.begins[entry.copy] + p.offset, p.nbytes) for p in entry.parts}
        parameters = {name: json.dumps(saved) for name, saved in self.pending.items() if name not in entries}
        parameters |= {name: entry.to_json(steps[name]) for name, entry in entries.items()}
        head = json.dumps({"format": FORMAT, "number": self.number, "spec": self.spec, "parameters": {}})
        record = (head[:-2] + ", ".join([f"{json.dumps(n)}: {text}" for n, text in parameters.items()]) + "}}").encode()
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
        self._unneeded, self.retired, self._ahead = [*self._unneeded, *self.retired], [], True
        if self._alone:
            self.wait()

    def _sums(self, begin: int, nbytes: int) -> list[Sum]:
        return [
            (at, size, self._crc(begin + at, size))
            for at in range(0, nbytes, CHUNK)
            for size in [min(CHUNK, nbytes - at)]
        ]

    def clear(self) -> None:
        """The state has moved elsewhere: a later process must not find what was here."""
        self.retired, self.pending, self._unneeded, self._ahead = [], {}, [], False  # other ranks may stay here
        try:
            self.commit({}, {})
            os.unlink(str(self.arena.path))  # tensors that someone still holds keep their bytes
            sync_directory(self.path)  # the record of no state goes last
            os.unlink(self.journal.path)
        except OSError:
            pass  # the directory is gone, and with it the state that was in it

    def close(self) -> None:
        self.arena.close()
        self.journal.close()
        self.lock.close()
