"""How state is cut into chunks: what is brought to the step at once. Arithmetic on layouts alone, without torch.

The state of a few rows of a parameter is, part by part, a run of bytes within the state of all its rows: parts are
laid out along rows. So the same ledger lines that say how large the parts are also say where the rows stand in them,
whatever the format. Where that does not hold (the column means of a factored matrix, a code that straddles rows), and
for rules that need statistics of the whole tensor, a parameter is fetched whole.
"""

# Without `from __future__ import annotations`: string annotations on a NamedTuple cost a millisecond of start-up.
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from memopt.core.ledger import Line
from memopt.core.rows import Rows

#: Direct reads and writes are of whole pages, and a part begins on one.
PAGE = 4096


class Part(NamedTuple):
    """Some rows' bytes ``[offset, offset + nbytes)`` of the part ``key``; ``at`` is where they stand in a buffer."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    at: int


class Piece(NamedTuple):
    """Some rows of one parameter, and their parts."""

    name: str
    rows: Rows
    parts: tuple[Part, ...]
    nbytes: int  # of the buffer that holds them


#: Lines of these rows of a parameter, without ``step``.
Layout = Callable[[Rows], Sequence[Line]]


class ChunkedState(NamedTuple):
    """A parameter's state as far as its cutting is concerned."""

    rows: Rows
    layout: Layout
    whole: bool  # fetched at once, whatever the layout
    dtype: str = "float32"  # of the parameter


class StoreOptions(NamedTuple):
    """What a placement's store is made for: the options of its placement, the spec in words, and which rank of how
    many."""

    options: Mapping[str, Any]
    spec: str = ""
    rank: int = 0
    world_size: int = 1


def room(nbytes: int) -> int:
    """Bytes of a buffer for so many bytes of a part that may begin anywhere in a page."""
    return -(-nbytes // PAGE) * PAGE + PAGE if nbytes else 0


def piece(name: str, outer: Rows, inner: Rows, layout: Layout, align: int = PAGE) -> Piece:
    """The rows ``inner`` of a parameter whose state here is of the rows ``outer``. The parts of a whole one stand in a
    buffer as where they are kept, one behind the other at multiples of ``align``: what is kept side by side is brought
    at once."""
    parts, at = [], 0
    if inner == outer:
        for line in layout(inner):
            parts.append(Part(line.key, line.dtype, line.shape, 0, line.nbytes, at))
            at += -(-line.nbytes // align) * align
        return Piece(name, inner, tuple(parts), at)
    before = {line.key: line.nbytes for line in layout(outer._replace(stop=inner.first))}
    for line in layout(inner):
        parts.append(Part(line.key, line.dtype, line.shape, before[line.key], line.nbytes, at))
        at += room(line.nbytes)
    return Piece(name, inner, tuple(parts), at)


def divisible(rows: Rows, layout: Layout) -> bool:
    """Whether every part of these rows is the parts of its rows, one after the other."""
    if rows.count < 2:
        return False
    middle = rows.first + rows.count // 2
    whole, low, high = (
        {line.key: line.nbytes for line in layout(r)}
        for r in (rows, rows._replace(stop=middle), rows._replace(first=middle))
    )
    return all(low[key] + high[key] == n for key, n in whole.items())


def height(rows: Rows, layout: Layout, target: int) -> int:
    """Rows of a piece of at most ``target`` bytes, at least one; a number that ends parts at pages where one fits."""
    one = rows._replace(stop=rows.first + 1)
    widths = [line.nbytes for line in layout(one) if line.nbytes]
    fits = max(1, (target - 2 * PAGE * len(widths)) // max(sum(widths), 1))
    step = max((PAGE // _power_of_two_in(width) for width in widths), default=1)
    return fits // step * step or fits


def _power_of_two_in(n: int) -> int:
    """The largest power of two that divides ``n``, at most a page."""
    return min(n & -n, PAGE)


def pieces(name: str, rows: Rows, layout: Layout, whole: bool, target: int, align: int = PAGE) -> list[Piece]:
    """The pieces in which one parameter's state is fetched, in order."""
    step = chunk_rows(rows, layout, whole, target)
    if step is None:
        return [piece(name, rows, rows, layout, align)]
    cuts = range(rows.first, rows.stop, step)
    return [piece(name, rows, rows._replace(first=i, stop=min(i + step, rows.stop)), layout) for i in cuts]


def chunk_rows(rows: Rows, layout: Layout, whole: bool, target: int) -> int | None:
    """Rows of a piece; None for all of them at once."""
    if whole or sum(room(line.nbytes) for line in layout(rows)) <= target or not divisible(rows, layout):
        return None
    return height(rows, layout, target)


class Extent(NamedTuple):
    """Bytes of the largest piece of a parameter, and of all its pieces."""

    largest: int
    total: int


def extent(rows: Rows, layout: Layout, whole: bool, target: int) -> Extent:
    """The same as of :func:`pieces`, without making them."""
    step = chunk_rows(rows, layout, whole, target)
    if step is None or step >= rows.count:
        nbytes = sum(-(-line.nbytes // PAGE) * PAGE for line in layout(rows))
        return Extent(nbytes, nbytes)
    full, rest = divmod(rows.count, step)
    each = sum(room(line.nbytes) for line in layout(rows._replace(stop=rows.first + step)))
    last = sum(room(line.nbytes) for line in layout(rows._replace(first=rows.stop - rest))) if rest else 0
    return Extent(each, each * full + last)


def extents(found: Sequence[ChunkedState], target: int) -> list[Extent]:
    """The extent of each; the same object is looked at once."""
    by_id = {id(one): extent(*one[:3], target) for one in {id(one): one for one in found}.values()}
    return [by_id[id(one)] for one in found]


class Buffers(NamedTuple):
    """``number`` buffers of ``nbytes`` each."""

    number: int
    nbytes: int


def buffers(found: Sequence[Extent], target: int, workspace: int, most: int) -> Buffers:
    """How many buffers, how large, stream parameters of these extents: at most ``most``, within ``workspace`` unless
    one piece alone is larger, and no more than what is streamed fills."""
    total = sum(e.total for e in found)
    if not total:
        return Buffers(0, 0)
    largest = max(max(e.largest for e in found), min(target, total))
    return Buffers(max(1, min(most, -(-total // largest), workspace // largest)), largest)


def target_of(workspace: int, target: int, most: int) -> int:
    """Bytes of a chunk: ``target``, or less where the workspace is too small for ``most`` of them."""
    return max(1, min(target, workspace // most))


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


def pack(found: "Iterable[T]", nbytes: int) -> "Iterator[list[T]]":
    """Pieces in order, as many at once as a buffer of ``nbytes`` holds."""
    chunk: list[T] = []
    filled = 0
    for one in found:
        if chunk and filled + one.nbytes > nbytes:
            yield chunk
            chunk, filled = [], 0
        chunk.append(one)
        filled += one.nbytes
    if chunk:
        yield chunk


T = TypeVar("T", bound=Sized)
