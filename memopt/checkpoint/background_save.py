"""Saves that are written while training goes on: they end before the process does, or it is said why not.

The thread that writes is one that the interpreter waits for at its end, after the last line of a script, ``sys.exit``,
an uncaught exception or a Ctrl-C. A failure that nobody has asked for by then is printed. A signal whose default action
ends the process (SIGTERM, unless Python has a handler for it) and SIGKILL leave the checkpoint before.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path

from memopt.partitions.world import is_distributed


class Saving:
    """A save that was begun. ``path`` is the checkpoint's name; after :meth:`wait` it is there, on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._told = False  # whether somebody has been told of the error

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path:
        """Wait until the checkpoint is durable; raises what went wrong."""
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            self._told = True
            raise self._error
        return self.path


#: The last save of each folder.
_RUNNING: dict[Path, Saving] = {}
#: The process whose end has been asked for.
_ASKED: dict[str, int] = {}
_EXIT = threading.Lock()
_exiting = False


def begin(where: Path, saving: Saving, run: Callable[[], None]) -> None:
    """Run a save beside the caller."""

    def work() -> None:
        try:
            run()
        except BaseException as error:
            saving._error = error
        with _EXIT:
            if _exiting:
                _tell(saving)

    if _ASKED.get("process") != os.getpid():  # what multiprocessing forks runs no atexit, and forgets these
        _ASKED["process"] = os.getpid()
        util.Finalize(None, _at_exit, exitpriority=0)
    saving._thread = threading.Thread(target=work, name="memopt.save")
    _RUNNING[where] = saving  # before it begins: the next save must find it, whatever interrupts this one
    saving._thread.start()


def wait_for(where: Path) -> None:
    """Wait for the save that is under way in this folder; on several ranks for that in any, whose messages would meet
    those of the next. Raises what went wrong there, and in any other folder where nobody has asked."""
    before = _RUNNING.pop(where, None)
    if before is not None:
        before.wait()
    for folder, other in list(_RUNNING.items()):
        if other.done or is_distributed():
            del _RUNNING[folder]
            if not other._told:
                other.wait()


def _at_exit() -> None:
    """The process ends: what is known to have failed is said now, and what fails from now on at once."""
    global _exiting
    with _EXIT:
        _exiting = True
        for saving in _RUNNING.values():
            _tell(saving)


def _after_threads() -> None:
    """All threads have ended, unless a second Ctrl-C ended the waiting."""
    _at_exit()
    for saving in _RUNNING.values():
        if not saving.done and not saving._told:
            saving._told = True
            _print(saving.path, "the process was ended before it was written")


def _tell(saving: Saving) -> None:
    if saving._error is not None and not saving._told:
        saving._told = True
        _print(saving.path, f"{type(saving._error).__name__}: {saving._error}")


def _print(path: Path, why: str) -> None:
    if sys.stderr is not None:
        print(f"memopt: the checkpoint {path} was not written: {why}", file=sys.stderr, flush=True)


atexit.register(_after_threads)
