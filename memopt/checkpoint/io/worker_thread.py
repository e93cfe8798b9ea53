"""One thread beside the caller's, which may be begun while the interpreter waits at its end for the threads there are.

concurrent.futures takes nothing more as soon as the main thread has ended, which is when an asynchronous save that was
begun in the last line of a script is in the middle of its files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, final

#: What is to be called, with what, and who waits for it; None ends the thread.
_Task = tuple[Callable[..., Any], tuple[Any, ...], "Future[Any]"]


@final
class Worker:
    """Executes what it is given, in order; its thread begins with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, run: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._thread is None:
            thread = threading.Thread(target=_work, args=(self._tasks,), name=self._name)
            thread.start()
            self._thread = thread
        done: Future[Any] = Future()
        self._tasks.put((run, arguments, done))
        return done

    def shutdown(self) -> None:
        """Wait until all has been executed."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None


def _work(tasks: SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        run, arguments, done = task
        try:
            done.set_result(run(*arguments))
        except BaseException as error:
            done.set_exception(error)
        del task, run, arguments, done  # what they hold may be freed
