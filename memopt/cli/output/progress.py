"""Progress on a terminal, on standard error; nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Event, Thread
from typing import Any

#: Told how much more is done: bytes, or steps.
Advance = Callable[[int], None]


def bar(what: str, nbytes: int | None) -> AbstractContextManager[Advance]:
    """Of bytes, with their speed; ``None`` where nobody knows how many."""
    return _shown(what, nbytes, ("DownloadColumn" if nbytes is not None else "FileSizeColumn", "TransferSpeedColumn"))


def progress(what: str, total: int) -> AbstractContextManager[Advance]:
    """Of things that are counted."""
    return _shown(what, total, ("MofNCompleteColumn",))


@contextmanager
def working(what: str, after: float = 1.0) -> Iterator[None]:
    """For work of which nobody knows how long it takes: after ``after`` seconds a sign of life and the seconds. What
    takes less shows nothing, and loads nothing."""
    if not sys.stderr.isatty():
        yield
        return
    done = Event()
    thread = Thread(target=_live, args=(what, done, after), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _live(what: str, done: Event, after: float) -> None:
    if done.wait(after):
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.SpinnerColumn("line"), rich.TextColumn(what), rich.TimeElapsedColumn())
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        shown.add_task(what, total=None)
        done.wait()


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
