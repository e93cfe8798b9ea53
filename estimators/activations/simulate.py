"""A tape run forward and backward: bytes alive at each operation, without a tensor."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from typing import NamedTuple

from estimators.activations.op import Op, Tensor
from estimators.activations.op_tape import Tape

#: What comes and goes, in order: ``(tensor or gradient, bytes)`` when it is allocated, ``(the same, 0)`` when it is
#: freed, ``(None, bytes)`` for what an operation allocates and frees inside, ``(operation, bytes)`` for gradients of
#: its parameters, and ``(RERUN, 0)`` where a checkpointed segment runs again. Kept only where somebody asks for it.
OperationLog = list[tuple[object, int]]
RERUN = "run again"


class Forward(NamedTuple):
    """``peak``: the most that is alive, the segment's input not counted. ``kept``: what stays for the backward pass;
    input, output and shared tensors are not counted. ``keeps``: which of those stay too, by ``id``."""

    peak: int
    kept: int
    keeps: frozenset[int]


class Again(NamedTuple):
    """A forward pass under checkpointing, run again in the backward pass. ``peak``: the most that is alive beside the
    input and what the first run kept. ``left``: bytes that the first run kept and nobody asked for again, which stay
    until the segment's backward pass is over."""

    peak: int
    left: int


class Backward(NamedTuple):
    """The moment of the backward pass at which most is alive: ``activations`` (saved tensors that are left, gradients
    of activations, temporaries; the segment's input counts if it is saved) and ``gradients`` of parameters made so
    far. ``total`` are the parameters' gradients at the end. ``waiting`` are the gradients of activations that are
    alive when the first saved tensor is asked for: under checkpointing the segment runs again at that moment.
    ``most`` are the activations of the moment that has most of them, whatever gradients of parameters there are, with
    those that one operation has just made, which are added to them;
    ``released`` are both, at the fullest moment where a gradient goes as soon as its operation is done.
    ``begins`` and ``leaves`` are the gradients that are there at the start and at the end, by the ``id`` of their
    tensor."""

    activations: int
    gradients: int
    total: int
    waiting: int
    most: int
    begins: dict[int, "_Gradient"]
    leaves: dict[int, "_Gradient"]
    released: tuple[int, int]


def forward(tape: Tape, keeping: str = "saved", log: OperationLog | None = None) -> Forward:
    """Tensors go when their last reader is done, unless they are kept or held. ``keeping``: what autograd saves
    (``saved``), ``nothing`` under full checkpointing, results of matrix products and fused attention (``products``)
    under selective checkpointing, those of every second product alone (``alternate``) under torchtitan's."""
    kept = _saved(tape) if keeping == "saved" else kept_by(tape, keeping)
    kept |= {id(t): t for t in tape.pinned}
    stay = {id(t) for t in tape.held} | kept.keys() | tape.boundary
    last_read = _last_reads(tape)
    made: dict[int, int] = {}
    live = peak = 0
    for i, op in enumerate(tape.ops):
        for tensor in (op.out, *(t for t in op.made if id(t) in kept)):
            if id(tensor) not in made and id(tensor) not in tape.given and tensor.base is None:
                made[id(tensor)] = tensor.nbytes
                live += tensor.nbytes
                if log is not None:
                    log.append((tensor, tensor.nbytes))
        peak = max(peak, live + op.forward_tmp)
        if log is not None and op.forward_tmp:
            log.append((None, op.forward_tmp))
        for key, tensor in _done(tape, op, i).items():
            if last_read[key] == i and key in made and key not in stay:
                live -= made.pop(key)
                if log is not None:
                    log.append((tensor, 0))
    kept = {**kept, **{id(t): t for t in tape.outlives}}
    inner = sum(tensor.nbytes for key, tensor in kept.items() if key not in tape.boundary)
    return Forward(peak, inner, frozenset(kept.keys() & tape.boundary))


def again(tape: Tape, keeping: str = "nothing", log: OperationLog | None = None) -> Again:
    """The second run stops where the last tensor is saved: before that operation, unless it is its result. Products
    that were kept are taken, not computed, and go as everything else does when they are read and not saved."""
    saved, kept = _saved(tape), kept_by(tape, keeping)
    stop = max((i for i, op in enumerate(tape.ops) if op.saved), default=-1)
    last_read = _last_reads(tape)
    there: dict[int, int] = {}
    live = peak = 0
    for i, op in enumerate(tape.ops[: stop + 1]):
        computed = i < stop or id(op.out) in {id(t) for t in op.saved}
        for tensor in (*op.made, *([op.out] if computed else [])):
            if id(tensor) not in there and id(tensor) not in tape.given and tensor.base is None:
                there[id(tensor)] = tensor.nbytes
                live += tensor.nbytes * (id(tensor) not in kept)
                if log is not None and id(tensor) not in kept:
                    log.append((tensor, tensor.nbytes))
        tmp = op.forward_tmp * (computed and id(op.out) not in kept)
        peak = max(peak, live + tmp)
        if log is not None and tmp:
            log.append((None, tmp))
        for key, tensor in _done(tape, op, i).items():
            if last_read[key] == i and key in there and key not in saved and key not in tape.boundary:
                live -= there.pop(key)
                if log is not None:
                    log.append((tensor, 0))
    rest = [t for op in tape.ops[stop:] for t in op.products if id(t) in kept and id(t) not in there]
    return Again(peak, sum(t.nbytes for t in rest))


def _saved(tape: Tape) -> dict[int, Tensor]:
    return {id(t): t for op in tape.ops for t in op.saved}


def kept_by(tape: Tape, keeping: str) -> dict[int, Tensor]:
    """What checkpointing keeps of the first run. Fused attention is told from other products by its statistics."""
    if keeping not in ("products", "alternate"):
        return {}
    kept: dict[int, Tensor] = {}
    products = 0
    for op in tape.ops:
        products += len(op.products) == 1
        if keeping == "products" or len(op.products) > 1 or products % 2:
            kept |= {id(t): t for t in op.products}
    return kept


def _last_reads(tape: Tape) -> dict[int, int]:
    """The operation after which nothing reads or holds a tensor, by its ``id``."""
    last = {id(t.stored): i for i, op in enumerate(tape.ops) for t in op.ins}
    for i, tensors in tape.holds.items():
        for t in tensors:
            last[id(t)] = max(i, last.get(id(t), 0))
    return last


def _done(tape: Tape, op: Op, i: int) -> dict[int, Tensor]:
    """Tensors that may go after an operation: what it reads, and what a variable held up to it."""
    return {id(t.stored): t.stored for t in (*op.ins, *tape.holds.get(i, ()))}


class _Gradient:
    """A gradient of an activation; several tensors may hold the same one."""

    __slots__ = ("holders", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.holders = 0


class _Pass:
    """The state of a backward pass."""

    __slots__ = ("accumulated", "gradients", "live", "log", "made", "most", "peak", "released", "saved", "savers")

    def __init__(self, tape: Tape, log: OperationLog | None = None) -> None:
        self.log: OperationLog = [] if log is None else log
        leaves = {id(op.out) for op in tape.ops if op.is_leaf and op.out.requires}  # made again with the segment
        tensors = {key: t.nbytes * (key not in tape.elsewhere or key in leaves) for key, t in _saved(tape).items()}
        self.saved = tensors
        self.savers: dict[int, int] = {}
        for op in tape.ops:
            for key in {id(t) for t in op.saved}:
                self.savers[key] = self.savers.get(key, 0) + 1
        self.live = sum(tensors.values())
        self.made = 0
        self.gradients: dict[int, _Gradient] = {}
        #: Gradients of tensors that no operation has made.
        self.accumulated: list[_Gradient] = []
        self.peak = self.released = (self.live, 0)
        self.most = self.live

    def note(self, extra: int = 0) -> None:
        self.most = max(self.most, self.live + extra)
        if self.live + extra + self.made > sum(self.peak):
            self.peak = (self.live + extra, self.made)

    def start(self, tensor: Tensor, nbytes: int) -> None:
        """A gradient that is there from the start."""
        self.gradients[id(tensor)] = gradient = _Gradient(nbytes)
        gradient.holders = 1
        self.live += nbytes

    def give(self, tensor: Tensor, gradient: _Gradient) -> None:
        """The engine's input buffer: the first gradient is taken as it is, the next is added in place, or into a new
        tensor where somebody else holds the first."""
        before = self.gradients.get(id(tensor))
        if before is None:
            self.gradients[id(tensor)] = gradient
            gradient.holders += 1
        elif before.holders > 1:
            total = _Gradient(tensor.nbytes)
            self.live += total.nbytes
            self.log.append((total, total.nbytes))
            self.note()
            before.holders -= 1
            total.holders = 1
            self.gradients[id(tensor)] = total

    def drop(self, gradient: _Gradient) -> None:
        if not gradient.holders and gradient.nbytes:
            self.live -= gradient.nbytes
            gradient.nbytes = 0
            self.log.append((gradient, 0))

    def run(self, op: Op) -> None:
        incoming = [g for t in (op.out, *op.views) if (g := self.gradients.pop(id(t), None)) is not None]
        self.made += op.gradients
        needed = {id(t): t for t in op.ins if t.requires}.values()
        outgoing = []
        for tensor in needed:
            if op.alias and (op.expands or tensor.nbytes == incoming[0].nbytes):
                outgoing.append((tensor, incoming[0]))
            else:
                outgoing.append((tensor, _Gradient(tensor.nbytes)))
                self.live += tensor.nbytes
                self.log.append((outgoing[-1][1], tensor.nbytes))
        self.note(op.backward_tmp)
        self.most = max(self.most, self.live + op.backward_tmp + op.gradients)
        self.released = max(self.released, (self.live + op.backward_tmp, op.gradients), key=sum)
        self.log += [(key, n) for key, n in ((None, op.backward_tmp), (op, op.gradients)) if n]
        if op.is_leaf:
            self.accumulated += incoming
        else:
            for gradient in incoming:
                gradient.holders -= 1
        for tensor, gradient in outgoing:
            self.give(tensor, gradient)
            self.drop(gradient)
        for gradient in incoming:
            self.drop(gradient)
        for key, tensor in {id(t): t for t in op.saved}.items():
            self.savers[key] -= 1
            if not self.savers[key]:
                self.live -= self.saved[key]
                self.log.append((tensor, 0))


def backward(
    tape: Tape, *, gradient: bool = True, waited: frozenset[str] = frozenset(), log: OperationLog | None = None
) -> Backward:
    """In reverse order, as autograd runs; an operation frees what it saved when it is done. ``gradient`` says whether
    one for the output comes in; a loss has none of weight. ``waited``: names of shared tensors that have a gradient
    already, to which this segment adds: bytes of its caller's account, unless the tensor was made here."""
    state = _Pass(tape, log)
    everything = state.live
    for tensor, nbytes in (
        (tape.out, tape.out.nbytes * gradient),
        *((tape.shared[name], 0) for name in waited if name in tape.shared),
        *((t, t.nbytes) for name, t in tape.shares.items() if name in waited),
    ):
        if id(tensor) not in state.gradients:  # a shared tensor may be the output
            state.start(tensor, nbytes)
    begins = {key: g for key, g in state.gradients.items() if g.nbytes}
    # A leaf lives as long as what accumulates its gradient; where it has one already it was made in an earlier run.
    state.live += sum(op.out.nbytes for op in tape.ops if op.is_leaf and id(op.out) in begins)
    state.note()
    waiting: int | None = None
    for op in reversed(tape.ops):
        if id(op.out) in state.gradients:
            if op.saved and waiting is None:
                waiting = state.live - everything
                state.log.append((RERUN, 0))
            state.run(op)
    for one in state.accumulated:
        one.holders = 0
        state.drop(one)
    leaves = {key: g for key, g in state.gradients.items() if g.nbytes}
    return Backward(*state.peak, state.made, waiting or 0, state.most, begins, leaves, state.released)
