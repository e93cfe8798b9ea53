"""Parameters that are cut between any two elements, as DeepSpeed cuts them: the rows that a rank steps. Without torch.

A rank has the elements ``[start, stop)`` of a flattened parameter, its span. Blocks, scales and means run along rows,
so it steps every row of which it has an element. A row that is cut is stepped on each rank that has a part of it, from
the same numbers and so to the same result; in sums over ranks it counts where it begins.
"""

# Without `from __future__ import annotations`: string annotations on a NamedTuple cost a millisecond of start-up.
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from memopt.core.rows import Rows, Shape

#: DeepSpeed's partitions begin at multiples of so many elements per rank (nccl_start_alignment_factor).
ALIGNMENT = 2
#: Elements of one flat vector at stage 3, about (sub_group_size).
SUB_GROUP = 10**9


class Span(NamedTuple):
    """Elements ``[start, stop)`` of a flattened parameter."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def rows(self, shape: Shape) -> Rows:
        """The rows that have an element of it.

        >>> Span(3, 8).rows((5, 4)), Span(0, 0).rows((5, 4)).count
        (Rows(shape=(5, 4), first=0, stop=2, flat=256), 0)
        """
        if not self.numel:
            return Rows(shape, 0, 0)
        cols = Rows.whole(shape).cols
        return Rows(shape, self.start // cols, -(-self.stop // cols))

    def counted(self, shape: Shape) -> slice:
        """Of :meth:`rows`, as a range of dimension 0, those that begin in it.

        >>> Span(3, 8).counted((5, 4)), Span(4, 8).counted((5, 4)), Span(5, 7).counted((5, 4))
        (slice(1, 2, None), slice(0, 1, None), slice(1, 1, None))
        """
        mine = self.rows(shape)
        if not mine.count:
            return slice(0, 0)
        first = -(-self.start // mine.cols)
        begin, end = Rows(shape, first, mine.stop).bounds
        return slice(begin - mine.bounds[0], end - mine.bounds[0])


def cut_rows(shape: Shape, spans: Sequence[Span]) -> tuple[int, ...]:
    """The rows of which several ranks have a part.

    >>> cut_rows((5, 4), [Span(0, 3), Span(3, 8), Span(8, 20)])
    (0,)
    """
    cols, numel = max(Rows.whole(shape).cols, 1), prod(shape)
    return tuple(sorted({s.start // cols for s in spans if s.numel and s.start % cols and s.start < numel}))


def spans_of_vector(numel: int, at: int, share: int, world_size: int) -> tuple[Span, ...]:
    """Of a parameter that begins at ``at`` in a vector of ``share`` elements per rank: stages 1 and 2.

    >>> spans_of_vector(10, 5, 8, 3)
    (Span(start=0, stop=3), Span(start=3, stop=10), Span(start=10, stop=10))
    """
    return tuple(
        Span(min(max(rank * share - at, 0), numel), min(max((rank + 1) * share - at, 0), numel))
        for rank in range(world_size)
    )


def spans_of_parameter(numel: int, world_size: int) -> tuple[Span, ...]:
    """Of a parameter that is cut by itself: stage 3.

    >>> spans_of_parameter(10, 3)
    (Span(start=0, stop=4), Span(start=4, stop=8), Span(start=8, stop=10))
    """
    part = -(-numel // world_size)
    return tuple(Span(min(r * part, numel), min((r + 1) * part, numel)) for r in range(world_size))


def share(numel: int, world_size: int) -> int:
    """Elements of one rank's vector at stages 1 and 2.

    >>> share(1001, 4)
    252
    """
    return -(-numel // (ALIGNMENT * world_size)) * ALIGNMENT


def rows_of_rank(shapes: Sequence[Shape], rank: int, world_size: int, stage: int) -> list[Rows | None]:
    """Of each parameter of one group, the rows that a rank steps: none where other ranks have parts of it, in whose
    sums it takes part; None where it has nothing to do with it.

    >>> [rows and rows[1:3] for rows in rows_of_rank([(5, 4), (3, 4), (9, 9)], 1, 3, 2)]
    [None, None, (0, 5)]
    """
    numels = [prod(shape) for shape in shapes]
    found: list[Rows | None] = []
    at, part = 0, share(sum(numels), world_size)
    for shape, numel in zip(shapes, numels, strict=True):
        if stage == 3:
            at, part = 0, max(-(-numel // world_size), 1)
        span = Span(*(min(max(r * part - at, 0), numel) for r in (rank, rank + 1)))
        is_split = numel > 0 and at // part != (at + numel - 1) // part
        found.append(span.rows(shape) if span.numel or is_split else None)
        at += numel
    return found


def vectors(shapes: Sequence[Shape], world_size: int, stage: int) -> list[int]:
    """Elements of the vectors that a rank has of one group of parameters."""
    numels = [prod(shape) for shape in shapes]
    if stage != 3:
        return [share(sum(numels), world_size)]
    found = [0]
    for numel in numels:
        if found[-1] >= SUB_GROUP:
            found.append(0)
        found[-1] += -(-numel // world_size)
    return found
