"""A model of torch's CUDA caching allocator: what is reserved when tensors come and go.

Requests are rounded to 512 bytes; up to 1 MiB they are cut from segments of 2 MiB, up to 10 MiB from segments of
20 MiB, and larger ones get a segment of their own, rounded to 2 MiB. A request takes the smallest free block that is
large enough, the lowest of equal ones, and leaves the rest as a free block: in the small pool always, in the large pool
where more than 1 MiB is left (what is less counts as allocated). Freed blocks merge with their free neighbours.
Segments are never given back, unless memory runs out. Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.13 and the
CUDA notes of its documentation; one stream.
"""

from bisect import bisect_left
from collections.abc import Sequence

from estimators.allocator.alloc_conf import DEFAULT, LARGE_SEGMENT, MIB, NEVER, Settings

ROUND, SMALL, SMALL_SEGMENT, SHARED, ROUND_LARGE = 512, MIB, 2 * MIB, 10 * MIB, 2 * MIB
#: Free blocks are ordered by one integer, size << ADDRESS_BITS | address: an estimate compares a million of them.
ADDRESS_BITS = 64


class OutOfMemory(Exception):
    """The limit does not hold what is asked for, even with all unused segments given back."""


class Block:
    """A range of a segment. ``before`` and ``after`` are its neighbours there; ``unused_since`` orders free blocks by
    age for the garbage collection."""

    __slots__ = ("address", "after", "before", "free", "requested", "size", "small", "unused_since")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address = address
        self.size = size
        self.small = small
        self.free = False
        self.requested = 0
        self.before: Block | None = None
        self.after: Block | None = None
        self.unused_since = 0


class Allocator:
    """``requested`` are the bytes asked for, ``allocated`` those of the blocks, ``reserved`` those of all segments;
    ``most_allocated`` and ``most_reserved`` are what torch.cuda.max_memory_allocated and max_memory_reserved say."""

    def __init__(self, settings: Settings = DEFAULT) -> None:
        self.settings = settings
        self.requested = self.allocated = self.reserved = 0
        self.most_requested = self.most_allocated = self.most_reserved = 0
        self.collected = 0  # how often unused segments were given back
        #: Free blocks of the large and the small pool by size and address, and their keys in the same order.
        self._free: tuple[list[Block], list[Block]] = ([], [])
        self._keys: tuple[list[int], list[int]] = ([], [])
        #: The least that is split off, by pool; whether every free block that is large enough serves.
        self._splits = (ROUND if settings.expandable else SMALL + 1, ROUND)
        self._any_serves = settings.max_split == NEVER and not settings.expandable
        self._next_address = 0  # segments lie one after the other, apart
        #: Last block of an expandable segment by pool: it can grow.
        self._last: list[Block | None] = [None, None]
        self._calls = [0, 0]

    def rounded(self, nbytes: int) -> int:
        """Bytes of the block that a request for so many gets, before what is left is too little to split off."""
        divisions = self.settings.divisions
        if divisions > 1 and nbytes > ROUND * divisions:
            power = 1 << (nbytes.bit_length() - 1)
            step = max(1, power // divisions)
            return nbytes if nbytes == power else -(-nbytes // step) * step
        return max(ROUND, -(-nbytes // ROUND) * ROUND)

    def malloc(self, nbytes: int) -> Block | None:
        """A block for so many bytes; None for none. Raises :class:`OutOfMemory` where a limit does not allow it."""
        if nbytes <= 0:
            return None
        settings = self.settings
        size = self.rounded(nbytes) if settings.divisions else (nbytes + 511) // ROUND * ROUND
        small = size <= SMALL
        self._calls[small] += 1
        keys = self._keys[small]
        at = bisect_left(keys, size << ADDRESS_BITS)
        block: Block | None = None
        if at < len(keys) and (self._any_serves or (at := self._chosen(at, size, small)) >= 0):
            del keys[at]
            block = self._free[small].pop(at)
            block.free = False
        else:
            block = self._segment(size, small)
        rest = block.size - size
        if rest >= self._splits[small] and (small or settings.expandable or size < settings.max_split):
            left = Block(block.address + size, rest, small)
            left.before, left.after = block, block.after
            if block.after is not None:
                block.after.before = left
            elif self._last[small] is block:
                self._last[small] = left
            block.after, block.size = left, size
            self._release(left)
        block.requested = nbytes
        self.requested += nbytes
        if self.requested > self.most_requested:
            self.most_requested = self.requested
        self.allocated += block.size
        if self.allocated > self.most_allocated:
            self.most_allocated = self.allocated
        return block

    def touch(self, nbytes: int) -> None:
        """Allocated and freed at once: where a free block serves it, only the most that was allocated may change."""
        small = nbytes <= SMALL
        keys = self._keys[small]
        size = (nbytes + 511) // ROUND * ROUND
        at = bisect_left(keys, size << ADDRESS_BITS)
        s = self.settings
        if nbytes <= 0 or at == len(keys) or not self._any_serves or s.divisions or s.threshold:
            self.free(self.malloc(nbytes))
            return
        found = keys[at] >> ADDRESS_BITS
        taken = size if found - size >= self._splits[small] else found
        if self.requested + nbytes > self.most_requested:
            self.most_requested = self.requested + nbytes
        if self.allocated + taken > self.most_allocated:
            self.most_allocated = self.allocated + taken

    def free(self, block: Block | None) -> None:
        """Back to its pool, merged with the free neighbours."""
        if block is None:
            return
        self.allocated -= block.size
        self.requested -= block.requested
        before, after, small = block.before, block.after, block.small
        if after is not None and after.free:
            self._take(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
            if self._last[small] is after:
                self._last[small] = block
        if before is not None and before.free:
            self._take(before)
            before.size += block.size
            before.after = block.after
            if block.after is not None:
                block.after.before = before
            if self._last[small] is block:
                self._last[small] = before
            block = before
        self._release(block)

    def give_back(self) -> int:
        """Unused segments to the driver, as torch.cuda.empty_cache() does: bytes given back."""
        nbytes = 0
        for small in (False, True):
            for block in list(self._free[small]):
                size, last = block.size, self._last[small]
                if self.settings.expandable:
                    # Whole pages of any free block could be unmapped; only those at the end are modelled.
                    if block is last:
                        page = SMALL_SEGMENT if small else LARGE_SEGMENT
                        nbytes += self._shrink(block, size // page * page)
                elif block.before is None and block.after is None:
                    self._take(block)
                    nbytes += size
        self.reserved -= nbytes
        return nbytes

    def copy(self, blocks: Sequence[Block | None]) -> "tuple[Allocator, list[Block | None]]":
        """Another allocator in the same state, and its blocks in the place of these. What no block that is free or one
        of these has beside it is left out: nothing can reach it any more."""
        made: dict[int, Block] = {}
        for begin in (*self._free[0], *self._free[1], *self._last, *blocks):
            if begin is None or id(begin) in made:
                continue
            first = begin
            while first.before is not None:
                first = first.before
            before: Block | None = None
            block: Block | None = first
            while block is not None:
                new = made[id(block)] = Block(block.address, block.size, block.small)
                new.free, new.requested, new.unused_since = block.free, block.requested, block.unused_since
                new.before = before
                if before is not None:
                    before.after = new
                before, block = new, block.after
        other = Allocator(self.settings)
        for name, value in vars(self).items():
            if isinstance(value, int):
                setattr(other, name, value)
        other._calls = [*self._calls]
        other._keys = [*self._keys[0]], [*self._keys[1]]
        other._free = [made[id(b)] for b in self._free[0]], [made[id(b)] for b in self._free[1]]
        other._last = [b and made[id(b)] for b in self._last]
        return other, [b and made[id(b)] for b in blocks]

    # Inside ----------------------------------------------------------------------------------------------------

    def _release(self, block: Block) -> None:
        small = block.small
        block.free = True
        block.unused_since = self._calls[small]
        keys = self._keys[small]
        key = block.size << ADDRESS_BITS | block.address
        at = bisect_left(keys, key)
        keys.insert(at, key)
        self._free[small].insert(at, block)

    def _take(self, block: Block) -> None:
        block.free = False
        keys = self._keys[block.small]
        at = bisect_left(keys, block.size << ADDRESS_BITS | block.address)
        del keys[at], self._free[block.small][at]

    def _chosen(self, at: int, size: int, small: bool) -> int:
        """The place of the free block that is taken, from that of the smallest that is large enough; -1 for none."""
        free, s = self._free[small], self.settings
        if s.expandable and at + 1 < len(free) and free[at] is self._last[small]:
            at += 1  # the block that can grow counts as the largest
        found = free[at].size
        return -1 if (size < s.max_split <= found) or (size >= s.max_split and found >= size + s.oversize) else at

    def _segment(self, size: int, small: bool) -> Block:
        """A new segment, or the expandable one made longer."""
        s = self.settings
        if s.limit and s.threshold:
            self._collect()
        if s.expandable:
            return self._grown(size, small)
        wanted = SMALL_SEGMENT if small else LARGE_SEGMENT if size < SHARED else -(-size // ROUND_LARGE) * ROUND_LARGE
        self._reserve(wanted)
        block = Block(self._next_address, wanted, small)
        self._next_address += wanted + LARGE_SEGMENT
        return block

    def _grown(self, size: int, small: bool) -> Block:
        page = SMALL_SEGMENT if small else LARGE_SEGMENT
        for attempt in range(2):
            last = self._last[small]
            there = last.size if last is not None and last.free else 0
            added = -(-(size - there) // page) * page
            if attempt or not self.settings.limit or self.reserved + added <= self.settings.limit:
                break
            self.collected += bool(self.give_back())  # which may shorten the last block
        self._reserve(added)
        if last is not None and last.free:
            self._take(last)
            last.size += added
            return last
        block = Block(last.address + last.size if last is not None else NEVER * small, added, small)
        if last is not None:
            last.after, block.before = block, last
        self._last[small] = block
        return block

    def _shrink(self, block: Block, nbytes: int) -> int:
        """The end of an expandable segment is unmapped."""
        if nbytes:
            self._take(block)
            block.size -= nbytes
            if block.size:
                self._release(block)
            else:
                self._last[block.small] = block.before
                if block.before is not None:
                    block.before.after = None
        return nbytes

    def _reserve(self, nbytes: int) -> None:
        limit = self.settings.limit
        if limit and self.reserved + nbytes > limit:
            self.collected += bool(self.give_back())
            if self.reserved + nbytes > limit:
                raise OutOfMemory(nbytes)
        self.reserved += nbytes
        if self.reserved > self.most_reserved:
            self.most_reserved = self.reserved

    def _collect(self) -> None:
        """Segments of the large pool that were unused for longer than the average go, until enough is given back."""
        target = self.reserved - int(self.settings.threshold * self.settings.limit)
        whole = [b for b in self._free[False] if b.before is None and b.after is None]
        while target > 0 and whole and not self.settings.expandable:
            ages = [self._calls[False] - b.unused_since for b in whole]
            average = sum(ages) / len(ages)
            going = [b for b, age in zip(whole, ages, strict=True) if age >= average]
            for block in going:
                self._take(block)
                self.reserved -= block.size
                target -= block.size
            self.collected += 1
            whole = [b for b in whole if b not in going]
