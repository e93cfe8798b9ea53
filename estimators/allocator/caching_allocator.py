"""A model of torch's CUDA caching allocator: what is reserved when tensors come and go.

Requests are rounded to 512 bytes; up to 1 MiB they are cut from segments of 2 MiB, up to 10 MiB from segments of
20 MiB, and larger ones get a segment of their own, rounded to 2 MiB. A request takes the smallest free block that is
large enough, the lowest of equal ones, and leaves the rest as a free block: in the small pool always, in the large pool
where more than 1 MiB is left (what is less counts as allocated). Freed blocks merge with their free neighbours.
Segments are never given back, unless memory runs out. Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.13 and the
CUDA notes of its documentation; one stream.
"""

from bisect import bisect_left, insort

from estimators.allocator.alloc_conf import DEFAULT, LARGE_SEGMENT, MIB, NEVER, Settings

ROUND, SMALL, SMALL_SEGMENT, SHARED, ROUND_LARGE = 512, MIB, 2 * MIB, 10 * MIB, 2 * MIB


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
        #: Free blocks of the large and the small pool by (size, address), and the block at an address.
        self._free: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._at: tuple[dict[int, Block], dict[int, Block]] = ({}, {})
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
        divisions = self.settings.divisions
        size = self.rounded(nbytes) if divisions else -(-nbytes // ROUND) * ROUND
        small = size <= SMALL
        self._calls[small] += 1
        block = self._best(size, small) or self._segment(size, small)
        rest = block.size - size
        if rest >= ROUND if small or self.settings.expandable else rest > SMALL and size < self.settings.max_split:
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
        s, free = self.settings, self._free[nbytes <= SMALL]
        size = -(-nbytes // ROUND) * ROUND
        at = bisect_left(free, (size, -1))
        if nbytes <= 0 or s.divisions or s.expandable or s.threshold or s.max_split != NEVER or at == len(free):
            self.free(self.malloc(nbytes))
            return
        found, small = free[at][0], nbytes <= SMALL
        taken = size if found - size >= ROUND and (small or found - size > SMALL) else found
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
            for size, address in list(self._free[small]):
                block = self._at[small][address]
                last = self._last[small]
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

    # Inside ----------------------------------------------------------------------------------------------------

    def _release(self, block: Block) -> None:
        block.free = True
        block.unused_since = self._calls[block.small]
        insort(self._free[block.small], (block.size, block.address))
        self._at[block.small][block.address] = block

    def _take(self, block: Block) -> None:
        block.free = False
        free = self._free[block.small]
        del free[bisect_left(free, (block.size, block.address))]
        del self._at[block.small][block.address]

    def _best(self, size: int, small: bool) -> Block | None:
        """The smallest free block that is large enough."""
        free, s = self._free[small], self.settings
        at = bisect_left(free, (size, -1))
        if at == len(free):
            return None
        if s.expandable and at + 1 < len(free) and self._at[small][free[at][1]] is self._last[small]:
            at += 1  # the block that can grow counts as the largest
        found = free[at][0]
        if (size < s.max_split <= found) or (size >= s.max_split and found >= size + s.oversize):
            return None
        block = self._at[small].pop(free[at][1])
        del free[at]
        block.free = False
        return block

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
        whole = [b for b in self._at[False].values() if b.before is None and b.after is None]
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
