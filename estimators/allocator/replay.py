"""A training step's allocations and frees, in their order, through the model of torch's allocator.

The tape of each segment (:mod:`estimators.activations`) says what comes and goes in it; segments of one kind have one
program, which is run once per layer. Weights come first, parameter by parameter; then steps follow: forward, backward,
the optimizer's step. From the second step on state is there, so two steps are run.
"""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from estimators.activations.chain import KEEPING
from estimators.activations.op import Op
from estimators.activations.simulate import RERUN, OperationLog, again, backward, forward, kept_by
from estimators.allocator.alloc_conf import DEFAULT, Settings
from estimators.allocator.caching_allocator import Block
from estimators.allocator.replayed_step import (
    AGAIN,
    FREE,
    GRADIENT,
    INSIDE,
    TAKE,
    Held,
    Program,
    Replay,
    Replayed,
    resumed,
)

if TYPE_CHECKING:
    from estimators.activations.chain import Called, Segment
    from estimators.activations.phases import Activations, Flown, Walked


class _Backward(NamedTuple):
    """``begins`` and ``leaves`` are the slots of the gradients that are there at the start and at the end: of the
    result (``out``), of the input (``x``), and of shared tensors by name."""

    program: Program
    begins: dict[str, int]
    leaves: dict[str, int]


class _Programs:
    """One segment's programs. Slots 0 and 1 are its input and its result (which may be its input)."""

    def __init__(self, segment: "Segment") -> None:
        self.segment = segment
        tape = segment.tape
        self.slots: dict[int, int] = {id(tape.x): 0}
        self.size = 2
        self.keys: list[object] = []  # told apart by id, so they must live
        self.out = self.slots.setdefault(id(tape.out), 1)
        self.out_is_shared = id(tape.out) in tape.elsewhere
        self.shared = {name: self.slot(t) for name, t in tape.shared.items()}
        self.shares = {name: self.slot(t) for name, t in tape.shares.items()}
        self.external = {0, self.out, *self.shared.values(), *self.shares.values()}
        log: OperationLog = []
        forward(tape, KEEPING[segment.checkpointing], log)
        self.forward = self.compiled(log)
        log = []
        if segment.checkpointed:
            again(tape, KEEPING[segment.checkpointing], log)
        self.again = self.compiled(log)
        self.backwards: dict[frozenset[str], _Backward] = {}
        saved = {slot for code, slot, _ in self.backward(frozenset()).program if code == FREE}
        self.again += [(FREE, slot, 0) for slot in _left(self.again) if slot not in saved]
        # What the forward pass leaves is saved, or kept by selective checkpointing, or lives as long as the model's
        # output; the rest goes when the segment is done: variables that held it, and what runs again.
        left = set(_left(self.forward)) - self.external
        kept = {self.slot(t) for t in kept_by(tape, KEEPING[segment.checkpointing]).values()}
        stays = kept if segment.checkpointed else saved
        self.outlives = sorted({self.slot(t) for t in (*tape.outlives, *tape.pinned)} & left - stays)
        self.forward += [(FREE, slot, 0) for slot in sorted(left - stays - set(self.outlives))]
        if segment.checkpointed:  # what runs again makes tensors of its own
            own = {slot: self.slot(object()) for slot in self.outlives}
            self.forward = [(code, own.get(slot, slot), nbytes) for code, slot, nbytes in self.forward]
            self.outlives = list(own.values())
        #: Kept, and asked for by nobody: freed when the segment's backward pass is over.
        self.left = sorted(left & kept - saved - {slot for code, slot, _ in self.again if code == FREE})

    def slot(self, key: object) -> int:
        if id(key) not in self.slots:
            self.slots[id(key)] = self.size
            self.size += 1
            self.keys.append(key)
        return self.slots[id(key)]

    def compiled(self, log: OperationLog) -> Program:
        program: Program = []
        for key, nbytes in log:
            if key is None:
                program.append((INSIDE, 0, nbytes))
            elif key is RERUN:
                program.append((AGAIN, 0, 0))
            elif isinstance(key, Op):
                program.append((GRADIENT, 0, nbytes))
            else:
                slot = self.slot(key)
                if nbytes or slot not in self.external:
                    program.append((TAKE if nbytes else FREE, slot, nbytes))
        return program

    def backward(self, waited: frozenset[str]) -> "_Backward":
        if waited not in self.backwards:
            log: OperationLog = []
            tape = self.segment.tape
            ran = backward(tape, gradient=self.segment.kind != "loss", waited=waited, log=log)
            named = {id(t): name for name, t in (*tape.shared.items(), *tape.shares.items())}
            named |= {id(tape.out): named.get(id(tape.out), "out"), id(tape.x): named.get(id(tape.x), "x")}
            begins = {named[key]: self.slot(g) for key, g in ran.begins.items() if key in named}
            leaves = {named[key]: self.slot(g) for key, g in ran.leaves.items() if key in named}
            self.backwards[waited] = _Backward(self.compiled(log), begins, leaves)
        return self.backwards[waited]


def _left(program: Program) -> list[int]:
    """Slots that a program allocates and does not free."""
    live = dict.fromkeys(slot for code, slot, _ in program if code == TAKE)
    for code, slot, _ in program:
        if code == FREE:
            live.pop(slot, None)
    return list(live)


#: The last tapes that were replayed, and their programs: several specs follow each other.
_LAST: "list[tuple[Walked, list[_Programs]]]" = []
_MOST_LAST = 32


def _programs(walked: "Walked") -> list[_Programs]:
    found = next((programs for tape, programs in _LAST if tape is walked), None)
    if found is None:
        known: dict[int, _Programs] = {}
        for s in walked.segments:
            if id(s) not in known:
                known[id(s)] = _Programs(s)
        found = [known[id(s)] for s in walked.segments]
        _LAST[:] = [(walked, found), *_LAST[: _MOST_LAST - 1]]
    return found


def replayed(ran: "Activations", held: Held, settings: Settings = DEFAULT, steps: int = 2) -> Replayed:
    """What the allocator hands out and reserves in the first steps. ``ran`` is the tape of one micro-batch."""
    return resumed(*_replay(ran, held, settings), steps)


def _replay(ran: "Activations", held: Held, settings: Settings) -> tuple[object, Replay]:
    """What is replayed, and how."""
    if ran.recorded is not None:
        from estimators.allocator.replay_recorded import ReplayRecorded

        return ran.recorded, ReplayRecorded(ran.recorded, held, settings)
    if ran.flown is not None:
        return ran.flown, _ReplayPipeline(ran.flown, held, settings)
    if ran.walked is None:
        raise ValueError("these activations do not say what they follow from")
    return ran.walked, _ReplayWalked(ran.walked, held, settings)


class _Flying(NamedTuple):
    """A micro-batch whose forward pass is over: its segments with their blocks, the last result, and what the layers
    were called with."""

    runs: "list[tuple[_Programs, list[Block | None]]]"
    shared: "dict[str, Block | None]"
    masks: "list[tuple[Called, Block | None]]"
    others: "tuple[Block | None, ...]"


class _ReplayWalked(Replay):
    def __init__(self, walked: "Walked", held: Held, settings: Settings) -> None:
        super().__init__(held, settings)
        self.walked = walked

    def micro_batch(self, first: bool) -> None:
        self.backward_pass(self.forward_pass(self.walked, first), first)

    def forward_pass(self, w: "Walked", first: bool) -> _Flying:
        """Through all segments. A block between two segments is the result of the one and the input of the other,
        whichever keeps it for the backward pass."""
        a = self.allocator
        tables, masks = a.malloc(w.tables), [(mask, a.malloc(mask.nbytes)) for mask in w.masks]
        x: Block | None = None
        shared: dict[str, Block | None] = {}
        runs: list[tuple[_Programs, list[Block | None]]] = []
        copies = []
        kept = False  # the segment before keeps its result
        for program in _programs(w):
            s = program.segment
            if s.kind == "loss":
                self.drop([block for mask, block in masks if mask.first is None])
            slots: list[Block | None] = [None] * program.size
            slots[0] = x
            for name, slot in program.shared.items():
                slots[slot] = shared.get(name)
            copies.append(a.malloc(s.tape.cached * s.checkpointed))
            self.play(program.forward, slots, first)
            for name, slot in program.shares.items():
                shared[name] = slots[slot]
            if not s.keeps_input and not kept and program.out:
                a.free(x)
                slots[0] = None
            x, kept = (None, False) if program.out_is_shared else (slots[program.out], s.keeps_output)
            runs.append((program, slots))
        for block in copies:
            a.free(block)
        if runs[-1][0].segment.kind != "loss":  # a stage of a pipeline
            self.drop([block for mask, block in masks if mask.first is None])
        return _Flying(runs, shared, masks, (x if not kept else None, tables))

    def drop(self, blocks: "Sequence[Block | None]") -> None:
        for block in blocks:
            self.allocator.free(block)

    def backward_pass(self, flying: _Flying, first: bool) -> None:
        a, (runs, shared) = self.allocator, flying[:2]
        waiting: dict[str, Block | None] = {}
        for at in range(len(runs) - 1, -1, -1):
            program, slots = runs[at]
            s = program.segment
            incoming = waiting.pop("x", None)
            how = program.backward(frozenset(waiting))
            slots += [None] * (program.size - len(slots))
            for name, slot in how.begins.items():
                slots[slot] = incoming if name == "out" else waiting.pop(name, None)
            if "out" not in how.begins:
                a.free(incoming)
            self.play(how.program, slots, first, program.again)
            for name, slot in how.leaves.items():
                waiting[name] = slots[slot]
            for slot in program.left:
                a.free(slots[slot])
            before = runs[at - 1][0].segment if at else None
            if slots[0] is not None and program.out and not (before and before.keeps_output):
                a.free(slots[0])
            if s.keeps_output and not program.out_is_shared:
                a.free(slots[program.out])
            for name in program.shares:
                a.free(shared.pop(name, None))
            self.drop([block for mask, block in flying.masks if mask.first == at])
        outlive = [slots[slot] for program, slots in runs for slot in program.outlives]
        self.drop([*waiting.values(), *shared.values(), *outlive, *flying.others])

    def play(self, program: Program, slots: list[Block | None], first: bool, again: Program = []) -> None:  # noqa: B006
        malloc, free, touch = self.allocator.malloc, self.allocator.free, self.allocator.touch
        for code, slot, nbytes in program:
            if code == TAKE:
                slots[slot] = malloc(nbytes)
            elif code == FREE:
                free(slots[slot])
                slots[slot] = None
            elif code == INSIDE:
                touch(nbytes)
            elif code == AGAIN:
                self.play(again, slots, first)
            elif self.held.release:
                while self.gradients:
                    free(self.gradients.pop())
                self.gradients.append(malloc(nbytes))
            elif first:
                self.gradients.append(malloc(nbytes))
            else:  # added to the one that is there
                touch(nbytes)


class _ReplayPipeline(_ReplayWalked):
    """A step of one rank of a pipeline: the passes of all its micro-batches in their order."""

    def __init__(self, flown: "Flown", held: Held, settings: Settings) -> None:
        super().__init__(flown.chunks[0], held, settings)
        self.flown = flown

    def micro_batch(self, first: bool) -> None:
        flying: list[list[_Flying]] = [[] for _ in self.flown.chunks]
        made = [not first] * len(self.flown.chunks)  # a chunk's gradients are there after its first backward pass
        for ahead, chunk in self.flown.order:
            if ahead:
                flying[chunk].append(self.forward_pass(self.flown.chunks[chunk], False))
            else:
                self.backward_pass(flying[chunk].pop(0), not made[chunk])
                made[chunk] = True
