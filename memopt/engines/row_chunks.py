"""A parameter's step in pieces of whole rows, so that what it allocates does not grow with the parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memopt.layout.param_step import Work

#: Elements of one piece. The plain path allocates up to 45 bytes for each.
PIECE = 2**20


def rows_of_piece(cols: int) -> int:
    """Rows of one piece: as many as stay within it, at least one.

    >>> rows_of_piece(4096), rows_of_piece(2**24)
    (256, 1)
    """
    return max(PIECE // max(cols, 1), 1)


def pieces(work: Work) -> Iterator[Work]:
    """The same work on ranges of its rows, one after the other; itself where the rule or a format needs the whole
    tensor. State cut at rows is the state of those rows."""
    rows = work.rows
    step = rows_of_piece(rows.cols)
    if work.layout.needs_whole or rows.count <= step:
        yield work
        return
    for first in range(rows.first, rows.stop, step):
        piece = rows._replace(first=first, stop=min(first + step, rows.stop))
        start, stop = (bound - rows.bounds[0] for bound in piece.bounds)
        cut = {key: work.state[key][where] for key, where in work.layout.slices(piece).items()}
        yield work._replace(
            layout=work.layout.at(piece), p=work.p[start:stop], g=work.g[start:stop], state={**work.state, **cut}
        )
