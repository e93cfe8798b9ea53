"""The model of torch's caching allocator: its documented rules case by case, and what holds for any sequence."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimators import InputError
from estimators.allocator.alloc_conf import MIB, Settings, parsed
from estimators.allocator.caching_allocator import ADDRESS_BITS, Allocator, Block, OutOfMemory

KIB = 2**10


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest of the small pool
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),  # from here on segments of their own, in steps of 2 MiB
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # what is left over is not split off, and counts as allocated
        (100 * MIB, 100 * MIB, 100 * MIB),
        (101 * MIB, 102 * MIB, 102 * MIB),
    ],
)
def test_one_request(nbytes: int, allocated: int, reserved: int) -> None:
    a = Allocator()
    a.malloc(nbytes)
    assert (a.allocated, a.reserved) == (allocated, reserved)


def test_no_bytes_are_no_block() -> None:
    a = Allocator()
    a.free(a.malloc(0))
    assert a.most_reserved == 0


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([MIB] * 4, 4 * MIB),
        ([6 * MIB] * 3, 20 * MIB),  # three of six in twenty; two are left
        ([6 * MIB] * 4, 40 * MIB),
        ([6 * MIB] * 3 + [2 * MIB], 20 * MIB),
        ([18 * MIB + 512, MIB + 512], 20 * MIB),  # rounded up to twenty, of which almost two are left
        ([18 * MIB, MIB + 512], 38 * MIB),
        ([512 * KIB] * 5, 4 * MIB),
    ],
)
def test_requests_share_segments(sizes: list[int], reserved: int) -> None:
    a = Allocator()
    for nbytes in sizes:
        a.malloc(nbytes)
    assert a.reserved == reserved


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    a = Allocator()
    large, middle, small = (a.malloc(n * MIB) for n in (60, 40, 20))
    for block in (large, middle, small):
        a.free(block)
    assert a.malloc(30 * MIB).address == middle.address
    assert a.malloc(10 * MIB).address == middle.address + 30 * MIB
    assert a.reserved == 120 * MIB


def test_segments_do_not_merge_but_blocks_of_one_do() -> None:
    a = Allocator()
    parts = [a.malloc(20 * MIB) for _ in range(2)]
    for part in parts:
        a.free(part)
    a.malloc(40 * MIB)
    assert a.reserved == 80 * MIB  # two segments of 20 hold no tensor of 40
    b = Allocator()
    b.free(b.malloc(40 * MIB))
    halves = [b.malloc(20 * MIB) for _ in range(2)]
    for half in halves:
        b.free(half)
    b.malloc(40 * MIB)
    assert b.reserved == 40 * MIB


def test_pages_of_an_expandable_segment_do() -> None:
    a = Allocator(Settings(expandable=True))
    for part in [a.malloc(20 * MIB) for _ in range(2)]:
        a.free(part)
    a.malloc(40 * MIB)
    assert (a.allocated, a.reserved) == (40 * MIB, 40 * MIB)
    a.malloc(45 * MIB)
    assert a.reserved == 100 * MIB  # by pages of 20 MiB
    a.malloc(15 * MIB)
    assert a.reserved == 100 * MIB
    a.malloc(MIB)
    assert a.reserved == 102 * MIB  # small ones in pages of 2 MiB


def test_the_end_that_can_grow_is_taken_last() -> None:
    a = Allocator(Settings(expandable=True))
    first, _, third = a.malloc(40 * MIB), a.malloc(20 * MIB), a.malloc(20 * MIB)
    a.free(first)
    a.free(third)
    assert a.malloc(15 * MIB).address == first.address


@pytest.mark.parametrize(
    ("divisions", "nbytes", "rounded"),
    [
        (0, 1200 * KIB, 1200 * KIB),
        (4, 1200 * KIB, 1280 * KIB),
        (2, 1200 * KIB, 1536 * KIB),
        (8, 2 * MIB, 2 * MIB),
        (4, 1500, 1536),  # up to 512 bytes a division, multiples of 512
    ],
)
def test_rounding_to_divisions_of_powers_of_two(divisions: int, nbytes: int, rounded: int) -> None:
    assert Allocator(Settings(divisions=divisions)).rounded(nbytes) == rounded


def test_blocks_over_max_split_size_are_kept_whole() -> None:
    a = Allocator(parsed("max_split_size_mb:100"))
    a.free(a.malloc(200 * MIB))
    a.malloc(50 * MIB)  # not from the large one
    assert a.reserved == 250 * MIB
    a.malloc(190 * MIB)  # within 20 MiB of it
    assert (a.reserved, a.allocated) == (250 * MIB, 250 * MIB)
    b = Allocator(parsed("max_split_size_mb:100"))
    b.free(b.malloc(200 * MIB))
    b.malloc(150 * MIB)  # too far from it
    assert b.reserved == 350 * MIB


def test_at_the_limit_unused_segments_go_back() -> None:
    for text in ("", "expandable_segments:True"):
        a = Allocator(parsed(text, limit=100 * MIB))
        kept, gone = a.malloc(20 * MIB), a.malloc(60 * MIB)
        a.free(gone)
        a.malloc(80 * MIB)
        assert (a.reserved, a.collected, kept.free) == (100 * MIB, 1 if not text else a.collected, False)
        with pytest.raises(OutOfMemory):
            a.malloc(20 * MIB)


def test_garbage_collection_begins_at_its_threshold() -> None:
    a = Allocator(parsed("garbage_collection_threshold:0.5", limit=200 * MIB))
    a.free(a.malloc(60 * MIB))
    a.malloc(80 * MIB)
    assert (a.reserved, a.collected) == (140 * MIB, 0)
    a.malloc(50 * MIB)  # fits into the unused 60
    b = Allocator(parsed("garbage_collection_threshold:0.5", limit=200 * MIB))
    b.free(b.malloc(60 * MIB))
    b.malloc(80 * MIB)
    b.malloc(70 * MIB)  # more than half is reserved: the unused 60 go first
    assert (b.reserved, b.collected) == (150 * MIB, 1)


@pytest.mark.parametrize(
    "text", ["expandable_segments:yes", "max_split_size_mb:20", "roundup_power2_divisions:3", "backend:x", "x"]
)
def test_settings_that_are_not_known_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not allowed; known are expandable_segments"):
        parsed(text)


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 40),
        st.one_of(st.integers(1, 3000), st.integers(MIB - 600, 3 * MIB), st.integers(MIB, 64 * MIB)),
    ),
    max_size=60,
)


def _check(a: Allocator, live: list[Block]) -> None:
    """Nothing overlaps, blocks are multiples of 512, and the books are right."""
    assert a.allocated == sum(b.size for b in live) <= a.reserved <= a.most_reserved
    spans = sorted((b.address, b.address + b.size) for b in live)
    spans += [(b.address, b.address + b.size) for pool in a._free for b in pool]
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert sum(end - start for start, end in spans) == a.reserved


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, text=st.sampled_from(["", "expandable_segments:True", "max_split_size_mb:32"]))
def test_any_sequence_keeps_the_books(requests: list[tuple[int, int]], text: str) -> None:
    a, live = Allocator(parsed(text)), []
    for choice, nbytes in requests:
        if choice % 3 == 0 and live:
            a.free(live.pop(choice % len(live)))
        else:
            live.append(a.malloc(nbytes))
            assert live[-1].size >= nbytes
        _check(a, live)
    for block in live:
        a.free(block)
    assert a.allocated == 0
    reserved = a.reserved
    assert a.give_back() <= reserved
    assert not any(b.before or b.after for pool in a._free for b in pool)


@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS)
def test_a_limit_that_was_not_reached_changes_nothing(requests: list[tuple[int, int]]) -> None:
    free, limited = Allocator(), Allocator(Settings(limit=2**40))
    for _, nbytes in requests:
        free.malloc(nbytes), limited.malloc(nbytes)
    assert (free.allocated, free.reserved) == (limited.allocated, limited.reserved)
    # more is never less while nothing is freed
    before = free.reserved
    free.malloc(5 * MIB)
    assert free.reserved >= before


@pytest.mark.parametrize("how", [Settings(), Settings(max_split=32 * MIB), Settings(divisions=4)])
def test_what_is_allocated_and_freed_at_once_changes_only_the_most(how):
    rng = random.Random(3)
    one, two = Allocator(how), Allocator(how)
    there = []
    for _ in range(2000):
        nbytes = rng.choice((700, 40_000, 900_000, 3 * MIB, 15 * MIB, 50 * MIB)) + rng.randrange(5000)
        if there and rng.random() < 0.45:
            for a, block in zip((one, two), there.pop(rng.randrange(len(there))), strict=True):
                a.free(block)
        elif rng.random() < 0.5:
            there.append((one.malloc(nbytes), two.malloc(nbytes)))
        else:
            one.touch(nbytes)
            two.free(two.malloc(nbytes))
        for name in ("requested", "allocated", "reserved", "most_requested", "most_allocated", "most_reserved"):
            assert getattr(one, name) == getattr(two, name), name
        assert one._keys == two._keys == tuple([b.size << ADDRESS_BITS | b.address for b in pool] for pool in one._free)
