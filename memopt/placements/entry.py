"""The state of one parameter in an arena: one copy of it, or two."""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from memopt.core.ledger import Line
from memopt.core.libc import advise
from memopt.layout.chunks import PAGE, Part
from memopt.placements.arena import Arena
from memopt.placements.stores.mapped_files import DONT_NEED, tensors_in

if TYPE_CHECKING:
    from torch import Tensor

#: Of a run of bytes of a part: where it begins, how many bytes, their CRC-32.
Sum = tuple[int, int, int]


def pages_of(lines: Sequence[Line]) -> int:
    """Bytes of the pages of one copy."""
    return sum(-(-line.nbytes // PAGE) * PAGE for line in lines)


class Room:
    """Room in an arena for the state of several parameters, ``nbytes`` for each of ``copies``: what they write in turn
    lies side by side, as what they read does, and goes by one request. Of one copy each, allocated one after the other,
    that is so in any case."""

    def __init__(self, arena: Arena, nbytes: int, copies: int) -> None:
        first = arena.allocate(copies * nbytes)
        self._arena, self._left = arena, nbytes
        self._begins = [first + i * nbytes for i in range(copies)]

    def take(self, nbytes: int) -> list[int] | None:
        """Where the copies of the next parameter begin; None where that many bytes are not left."""
        if nbytes > self._left:
            return None
        begins, self._left = self._begins, self._left - nbytes
        self._begins = [begin + nbytes for begin in begins]
        return begins

    def close(self) -> None:
        """Give back what nobody took."""
        for begin in reversed(self._begins) if self._left else ():
            self._arena.release(begin, self._left)
        self._left = 0


class Entry:
    """``begins`` are where its copies begin in the arena, ``copy`` which of them is the state, ``offsets`` where each
    part begins in a copy, ``sums`` the checksums by part, or None where they are not known yet, ``uncommitted``
    whether a step has written the copy since the last commit."""

    def __init__(self, lines: Sequence[Line], begins: list[int], arena: Arena, copy: int = 0) -> None:
        self.parts: list[Part] = []
        end = 0
        for line in lines:
            self.parts.append(Part(line.key, line.dtype, line.shape, end, line.nbytes, 0))
            end += -(-line.nbytes // PAGE) * PAGE
        self.nbytes = end
        self.state_nbytes = sum(part.nbytes for part in self.parts)
        self.offsets = {part.key: part.offset for part in self.parts}
        self.nbytes_of = {part.key: part.nbytes for part in self.parts}
        self.begins = begins
        self._forms = [(p.key, json.dumps([p.key, p.dtype, list(p.shape)])[:-1]) for p in self.parts]
        self.copy = copy
        self.uncommitted = False
        self.sums: dict[str, list[Sum]] | None = None
        self._next_sums: dict[str, list[Sum]] = {part.key: [] for part in self.parts}
        self._maps = [arena.map(begin, end) if end else None for begin in begins]
        self._tensors = [tensors_in(memory, self.parts) for memory in self._maps]

    @classmethod
    def allocate(cls, arena: Arena, lines: Sequence[Line], copies: int, room: Room | None = None) -> Entry:
        """Zeros in room that the arena has reserved, or in ``room``, where that is large enough."""
        nbytes = pages_of(lines)
        begins = room.take(nbytes) if room else None
        return cls(lines, begins or Room(arena, nbytes, copies).take(nbytes) or [], arena)

    def release(self, arena: Arena) -> None:
        """Give the room back, each copy when nobody holds a tensor of it any more."""
        maps, self._maps, self._tensors = self._maps, [], []  # once, whatever interrupts it
        for memory, begin in zip(maps, self.begins[: len(maps)], strict=True):
            if memory is not None:
                weakref.finalize(memory, arena.release, begin, self.nbytes).atexit = False

    def begin(self, copy: int) -> int:
        return self.begins[copy]

    @property
    def next(self) -> int:
        """The copy that a step writes: never the one that is committed."""
        return self.copy if self.uncommitted or len(self.begins) == 1 else 1 - self.copy

    def begin_step(self) -> None:
        """Nothing of the next copy is written."""
        for found in self._next_sums.values():
            found.clear()

    def note_written(self, part: Part, crc: int) -> None:
        """These bytes of the next copy are written, and this is their CRC-32. From any thread."""
        self._next_sums[part.key].append((part.offset, part.nbytes, crc))

    def end_step(self, state: dict[str, Tensor]) -> None:
        """The next copy is the state from now on where all of it was written. One that is the only one stays it."""
        nbytes = sum([size for found in self._next_sums.values() for _, size, _ in found])
        if len(self.begins) < 2 or nbytes != self.state_nbytes:
            return
        for found in self._next_sums.values():
            found.sort()
        # The lists are used again: of a thousand parameters the garbage collector would look through new ones.
        sums = self._next_sums
        self._next_sums = self.sums if self.sums is not None else {part.key: [] for part in self.parts}
        self.copy, self.uncommitted, self.sums = self.next, True, sums
        state.update(self._tensors[self.copy])

    def tensors(self) -> dict[str, Tensor]:
        """The state: tensors that are the file."""
        return dict(self._tensors[self.copy])

    def unmap(self) -> None:
        """What someone has read of it as memory need not stay in memory; the file has it."""
        for memory in self._maps:
            if memory is not None:
                advise(ctypes.addressof(memory), self.nbytes, DONT_NEED)

    def to_json(self, step: float) -> str:
        """What a record says of it (:mod:`memopt.placements.stores.record`). Text that is put together: a thousand
        small parameters have thousands of lists, which the garbage collector would look through."""
        sums = self.sums or {}
        found = [", ".join([f"[{a}, {n}, {crc}]" for a, n, crc in sums.get(key, ())]) for key, _ in self._forms]
        parts = [f"{form}, [{some}]]" for (_, form), some in zip(self._forms, found, strict=True)]
        begins, joined = ", ".join(map(str, self.begins)), ", ".join(parts)
        return f'{{"step": {step!r}, "begins": [{begins}], "copy": {self.copy}, "parts": [{joined}]}}'


#: Of a part in a chunk: its entry, where it is in the buffer, and in the entry's copy.
ChunkPart = tuple[Entry, Part, int, int]


def runs(found: Sequence[tuple[int, int, Part]]) -> list[tuple[int, int, int]]:
    """Of parts ``(place in a buffer, offset in the file, part)`` the whole pages that have them, ``(place, offset,
    bytes)``: neighbours in both are one.

    >>> a, b = (Part(key, "uint8", (5000,), 0, 5000, 0) for key in "ab")
    >>> runs([(0, 8192, a), (8192, 16384, b), (16384, 4096, a)])
    [(0, 8192, 16384), (16384, 4096, 8192)]
    """
    merged: list[list[int]] = []
    for at, offset, part in found:
        shift = offset % PAGE
        offset, size = offset - shift, -(-(shift + part.nbytes) // PAGE) * PAGE
        last = merged[-1] if merged else None
        if last and last[0] + last[2] == at and last[1] + last[2] == offset:
            last[2] += size
        else:
            merged.append([at, offset, size])
    return [(at, offset, size) for at, offset, size in merged]


def fetched(places: Sequence[ChunkPart]) -> list[tuple[int, int, int]]:
    """What is read for the parts of a chunk, of the copies that are the state: ``(place, offset, bytes)``."""
    return runs([(at, entry.begin(entry.copy) + offset, part) for entry, part, at, offset in places])


def written(places: Sequence[ChunkPart]) -> list[tuple[int, int, int]]:
    """What is written of the parts of a chunk, to the next copy of each entry: ``(place, offset, bytes)``."""
    whole = [one for one in places if one[1].nbytes == one[0].nbytes_of[one[1].key]]
    found = runs([(at, entry.begin(entry.next) + offset, part) for entry, part, at, offset in whole])
    for entry, part, at, offset in places if len(whole) < len(places) else ():
        if part.nbytes < entry.nbytes_of[part.key]:  # the pages at its ends are those of other rows too
            found.append((at + offset % PAGE, entry.begin(entry.next) + offset, part.nbytes))
    return found


@contextmanager
def rewriting(states: Sequence[tuple[Entry, dict[str, Tensor]]]) -> Iterator[None]:
    """Around a step: of entries with two copies, those of which it writes everything are the state afterwards."""
    for entry, _ in states:
        entry.begin_step()
    yield
    for entry, state in states:
        entry.end_step(state)


class ChunkMoves:
    """What is read and written of a chunk in every step, worked out once for each way in which the copies stand."""

    #: Of parameters without a gradient in some steps copies stand in many ways.
    REMEMBERED = 4

    def __init__(self, places: Sequence[ChunkPart]) -> None:
        self.places = places
        self.nbytes = sum(part.nbytes for _, part, _, _ in places)
        self._entries = list(dict.fromkeys(entry for entry, _, _, _ in places))
        self._moves: dict[tuple[int, ...], tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]] = {}

    def now(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """:func:`fetched` and :func:`written` of this step."""
        key = tuple([2 * entry.copy + entry.uncommitted for entry in self._entries])
        if key not in self._moves:
            if len(self._moves) >= self.REMEMBERED:
                self._moves.clear()
            self._moves[key] = fetched(self.places), written(self.places)
        return self._moves[key]
