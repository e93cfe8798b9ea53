"""A parameter's step in pieces of whole rows, so that what it allocates does not grow with the parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from memopt.geometry import Rows

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.engines.work import Work
    from memopt.formats import Format
    from memopt.rules import Moment

#: Elements of one piece. The plain path allocates up to 45 bytes for each.
PIECE = 2**20


def rows_of_piece(cols: int) -> int:
    """Rows of one piece: as many as stay within it, at least one.

    >>> rows_of_piece(4096), rows_of_piece(2**24)
    (256, 1)
    """
    return max(PIECE // max(cols, 1), 1)


def pieces(work: Work, moments: Sequence[tuple[Moment, Format, str]], element_wise: bool, kept: str) -> Iterator[Work]:
    """The same work on ranges of its rows, one after the other; itself where the rule needs the whole tensor.

    State cut at rows is the state of those rows, and so is what a master keeps under the key ``kept``.
    """
    rows = work.rows
    step = rows_of_piece(rows.cols)
    if not element_wise or any(fmt.name == "factored" for _, fmt, _ in moments) or rows.count <= step:
        yield work
        return
    for first in range(rows.first, rows.stop, step):
        piece = Rows(rows.shape, first, min(first + step, rows.stop))
        start, stop = (bound - rows.bounds[0] for bound in piece.bounds)
        state = {**work.state, **_cut(work, moments, piece)}
        if kept in state:
            state[kept] = work.state[kept][start:stop]
        yield work._replace(rows=piece, p=work.p[start:stop], g=work.g[start:stop], state=state)


def _cut(work: Work, moments: Sequence[tuple[Moment, Format, str]], piece: Rows) -> dict[str, Tensor]:
    """Views of these rows of every part of every moment."""
    found = {}
    before = Rows(piece.shape, work.rows.first, piece.first)
    for moment, fmt, _ in moments:
        skipped = fmt.layout(moment, before)
        for part, tensor in fmt.layout(moment, piece).items():
            key = f"{moment.name}.{part}" if part else moment.name
            start = skipped[part].shape[0]
            found[key] = work.state[key][start : start + tensor.shape[0]]
    return found
