"""Progress bars on a terminal, on standard error; nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

#: Told how much more is done: bytes, or steps.
Advance = Callable[[int], None]


def bar(what: str, nbytes: int | None) -> AbstractContextManager[Advance]:
    """Of bytes, with their speed; ``None`` where nobody knows how many."""
    return _shown(what, nbytes, ("DownloadColumn", "TransferSpeedColumn"))


def progress(what: str, total: int) -> AbstractContextManager[Advance]:
    """Of things that are counted."""
    return _shown(what, total, ("MofNCompleteColumn",))


@contextmanager
def _shown(what: str, total: int | None, figures: tuple[str, ...]) -> Iterator[Advance]:
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich import progress as rich
    from rich.console import Console

    middle: list[Any] = [getattr(rich, name)() for name in figures]
    columns = (rich.TextColumn(what), rich.BarColumn(), *middle, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=total)
        yield lambda count: shown.advance(task, count)
