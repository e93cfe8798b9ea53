"""Weights, steps and what is held besides the tape, through the model of torch's allocator."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Sequence
from typing import NamedTuple

from estimators.allocator.alloc_conf import Settings
from estimators.allocator.caching_allocator import Allocator, Block

#: What an instruction does with a slot: free it, allocate into it, allocate and free, allocate a gradient, run again.
FREE, TAKE, INSIDE, GRADIENT, AGAIN = range(5)
Program = list[tuple[int, int, int]]


class Held(NamedTuple):
    """What is allocated besides the tape. ``load``: what comes and goes while the model is loaded, as ``(name, bytes)``
    and ``(name, 0)``. ``empty``: the cache is emptied then. ``state``: of tensors that the first step allocates.
    ``step``: of those that a step allocates and frees together. ``whole``: held from the first forward pass on.
    ``batches``: micro-batches per step. ``release``: a gradient goes when the next one is made."""

    load: Sequence[tuple[object, int]]
    state: Sequence[int] = ()
    step: Sequence[int] = ()
    whole: Sequence[int] = ()
    batches: int = 1
    release: bool = False
    empty: bool = False


class Replayed(NamedTuple):
    """The most that was asked for, allocated (blocks may be larger) and reserved, and what loading had reserved."""

    requested: int
    allocated: int
    reserved: int
    loaded: int


class Begun(NamedTuple):
    """After the first micro-batch: it has met no state, so that it is the same under every spec. ``key`` is all that it
    depends on but for the tape; ``found`` are the results by what the rest depends on."""

    key: tuple[object, ...]
    allocator: Allocator
    gradients: list[Block | None]
    loaded: int
    found: dict[object, Replayed]


class Replay:
    """Weights, then steps. What a micro-batch allocates is a subclass's."""

    def __init__(self, held: Held, settings: Settings) -> None:
        self.held = held
        self.allocator = Allocator(settings)
        self.gradients: list[Block | None] = []
        self.loaded = 0

    def key(self) -> tuple[object, ...]:
        held = self.held
        return held.load, held.whole, held.release, held.empty, self.allocator.settings

    def begun(self) -> Begun:
        return Begun(self.key(), *self.allocator.copy(self.gradients), self.loaded, {})

    def resume(self, begun: Begun) -> None:
        self.allocator, self.gradients = begun.allocator.copy(begun.gradients)
        self.loaded = begun.loaded

    def begin(self) -> None:
        """The model is loaded, and the first micro-batch runs."""
        a, held = self.allocator, self.held
        there: dict[object, Block | None] = {}
        for key, nbytes in held.load:
            if nbytes:
                there[key] = a.malloc(nbytes)
            else:
                a.free(there.pop(key, None))
        self.loaded = a.most_reserved
        if held.empty:
            a.give_back()
        for nbytes in held.whole:
            a.malloc(nbytes)
        self.micro_batch(first=True)

    def run(self, steps: int) -> Replayed:
        """So many steps, of which :meth:`begin` has run the first micro-batch."""
        a, held = self.allocator, self.held
        for step in range(steps):
            # The last of several micro-batches meets state and all gradients: it stands for the rest of its step.
            if step:
                self.micro_batch(first=held.batches == 1)
            for nbytes in held.state if not step else ():
                a.malloc(nbytes)
            for block in [a.malloc(nbytes) for nbytes in held.step]:
                a.free(block)
            while self.gradients and (held.batches == 1 or step == steps - 1):
                a.free(self.gradients.pop())
        return Replayed(a.most_requested, a.most_allocated, a.most_reserved, self.loaded)

    def micro_batch(self, first: bool) -> None:
        raise NotImplementedError


#: The last beginnings of a replay and the tapes that they are of: the specs of a table go on from there, and so do
#: answers in which another spec was asked for; where only the card changed, nothing is replayed.
_BEGUN: "list[tuple[object, Begun]]" = []
_MOST_BEGUN, _MOST_FOUND = 8, 64


def resumed(tape: object, replay: Replay, steps: int) -> Replayed:
    """What so many steps of ``replay`` give: from what is known of its tape where that is its beginning, too."""
    held, key = replay.held, replay.key()
    begun = next((one for of, one in _BEGUN if of is tape and one.key == key), None)
    rest = (steps, held.batches, *held.state, "step", *held.step)
    if begun is None:
        replay.begin()
        begun = replay.begun()
        _BEGUN[:] = [(tape, begun), *_BEGUN[: _MOST_BEGUN - 1]]
    elif rest not in begun.found:
        replay.resume(begun)
    if rest not in begun.found:
        if len(begun.found) == _MOST_FOUND:
            begun.found.clear()
        begun.found[rest] = replay.run(steps)
    return begun.found[rest]
