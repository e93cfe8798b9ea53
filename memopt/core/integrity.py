"""Whether the state of an optimizer is whole: one mark for all that changes it in more than one move.

A step, a load or a conversion changes parameters and state one after the other. The mark is set before the first change
and cleared after the last. An error, Ctrl-C or a lack of memory in between leaves it, and whatever would take the state
for whole (a step, ``save``, ``state_dict``, ``convert_``, a copy) raises its sentence until a checkpoint is loaded or
the state is made anew. Between any two bytecodes the state is therefore as before, as after, or marked; a mark that was
set a bytecode too early or cleared one too late refuses state that is whole, which loses nothing.
"""

from __future__ import annotations

from threading import get_ident
from types import TracebackType
from typing import Any

REPAIR = (
    "parameters and state may be of two different steps. Load a checkpoint (memopt.load with model= and optimizer=) "
    "to go on, or keep the parameters as they are and make the state anew: opt.init_state(anew=True)"
)


class Integrity:
    """``marks`` is empty where nothing is being changed and nothing was interrupted: by thread, what it is changing.

    A thread that finds its own mark while it is not changing anything was interrupted. An error that ends a change
    makes the mark everybody's: what is left by a thread that steps beside ``backward()`` must stop the main thread.

    ``snapshot`` is empty, or what :meth:`memopt.Optimizer.consolidate_state_dict` collected: every change drops it.
    """

    __slots__ = ("marks", "snapshot")

    def __init__(self) -> None:
        self.marks: dict[int | None, str] = {}
        self.snapshot: tuple[Any, ...] = ()

    def changing(self, what: str, *, restores: bool = False) -> CriticalSection:
        """Around all that changes parameters and state: ``what``, as a sentence begins. What ``restores`` writes all of
        the state, and ends every mark that is there."""
        self.snapshot = ()
        return CriticalSection(self.marks, what, restores)

    @property
    def torn(self) -> str | None:
        """Why the state may not be whole, or None."""
        for owner in (None, get_ident()):
            if owner in self.marks:
                return f"{self.marks[owner]}: {REPAIR}"
        return None

    def check(self) -> None:
        """Raise RuntimeError where the state may not be whole."""
        sentence = self.torn if self.marks else None
        if sentence is not None:
            raise RuntimeError(sentence)


class CriticalSection:
    """A context manager without a generator: there is no bytecode at which the mark is neither set nor left."""

    __slots__ = ("_inner", "_marks", "_restores", "_what")

    def __init__(self, marks: dict[int | None, str], what: str, restores: bool) -> None:
        self._marks, self._what, self._restores = marks, what, restores
        self._inner = False

    def __enter__(self) -> None:
        mine = get_ident()
        self._inner = mine in self._marks and not self._restores
        if not self._inner:
            self._marks[mine] = f"{self._what} was interrupted"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._inner:
            return
        if kind is not None:
            self._marks[None] = f"{self._what} stopped in the middle ({str(error) or kind.__name__})"
        elif self._restores:
            self._marks.pop(None, None)
        self._marks.pop(get_ident(), None)
