"""A traced step as a tape: what comes and goes, in order."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from typing import NamedTuple

#: What an event is: a storage goes or comes, is there inside of an operation alone, or has become a parameter's
#: gradient; one of what the model returns; where a phase begins.
FREE, TAKE, INSIDE, GRADIENT, OUTPUT, MARK = 0, 1, 2, 3, 9, 10
#: Phases: the head and the loss, the backward pass, what is after it.
LOSS, BACKWARD, END = 0, 1, 2
#: ``(code, slot, bytes)``; of a ``MARK`` the second is the phase.
TapeEvent = tuple[int, int, int]


class Recorded(NamedTuple):
    """One micro-batch. ``slots``: how many storages there are. ``outputs``: the slots of what the model returns."""

    events: tuple[TapeEvent, ...]
    slots: int
    outputs: frozenset[int]

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor between the model's ends."""
        found = 0
        for code, slot, nbytes in self.events:
            if code == MARK and slot == LOSS:
                break
            found = max(found, nbytes if code == TAKE else 0)
        return found

    def with_outputs(self) -> "Recorded":
        """The same step where the model's output lives until the backward pass is over."""
        kept = [e for e in self.events if e[0] == FREE and e[1] in self.outputs]
        rest = [e for e in self.events if not (e[0] == FREE and e[1] in self.outputs)]
        return self._replace(events=(*rest, *kept))
