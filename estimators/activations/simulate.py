"""A tape run forward and backward: bytes alive at each operation, without a tensor."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from typing import NamedTuple

from estimators.activations.tape import Op, Tape, Tensor


class Forward(NamedTuple):
    """``peak``: the most that is alive, the segment's input not counted. ``saved``: what stays for the backward pass,
    input and output not counted. ``saves_input``, ``saves_output``: whether those stay too."""

    peak: int
    saved: int
    saves_input: bool
    saves_output: bool


class Backward(NamedTuple):
    """The moment of the backward pass at which most is alive: ``activations`` (saved tensors that are left, gradients
    of activations, temporaries; the segment's input counts if it is saved) and ``gradients`` of parameters made so
    far. ``total`` are the parameters' gradients at the end. ``waiting`` are the gradients of activations that are
    alive when the first saved tensor is asked for: under checkpointing the segment runs again at that moment.
    ``most`` are the activations of the moment that has most of them, whatever gradients of parameters there are."""

    activations: int
    gradients: int
    total: int
    waiting: int
    most: int


def forward(tape: Tape, *, saving: bool = True) -> Forward:
    """Tensors go when their last reader is done, unless they are saved or held. ``saving=False`` is a forward pass
    under checkpointing."""
    kept: set[int] = {id(t) for t in tape.held}
    if saving:
        kept.update(id(t) for op in tape.ops for t in op.saved)
    last_read = {id(t): i for i, op in enumerate(tape.ops) for t in op.ins}
    boundary = {id(tape.x), id(tape.out)}
    made: dict[int, int] = {}
    live = peak = 0
    for i, op in enumerate(tape.ops):
        for tensor in (op.out, *(op.saved if saving else ())):
            if id(tensor) not in made and id(tensor) != id(tape.x):
                made[id(tensor)] = tensor.nbytes
                live += tensor.nbytes
        peak = max(peak, live + op.forward_tmp)
        for tensor in {id(t): t for t in op.ins}.values():
            if last_read[id(tensor)] == i and id(tensor) in made and id(tensor) not in kept | boundary:
                live -= made.pop(id(tensor))
    saved = {id(t): t.nbytes for op in tape.ops for t in op.saved} if saving else {}
    inner = sum(nbytes for key, nbytes in saved.items() if key not in boundary)
    return Forward(peak, inner, id(tape.x) in saved, id(tape.out) in saved and tape.out is not tape.x)


class _Gradient:
    """A gradient of an activation; several tensors may hold the same one."""

    __slots__ = ("holders", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.holders = 0


class _Pass:
    """The state of a backward pass."""

    __slots__ = ("gradients", "live", "made", "most", "peak", "saved", "savers")

    def __init__(self, tape: Tape) -> None:
        tensors = {id(t): t.nbytes for op in tape.ops for t in op.saved}
        self.saved = tensors
        self.savers: dict[int, int] = {}
        for op in tape.ops:
            for key in {id(t) for t in op.saved}:
                self.savers[key] = self.savers.get(key, 0) + 1
        self.live = sum(tensors.values())
        self.made = 0
        self.gradients: dict[int, _Gradient] = {}
        self.peak = (self.live, 0)
        self.most = self.live

    def note(self, extra: int = 0) -> None:
        self.most = max(self.most, self.live + extra)
        if self.live + extra + self.made > sum(self.peak):
            self.peak = (self.live + extra, self.made)

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
            self.note()
            before.holders -= 1
            total.holders = 1
            self.gradients[id(tensor)] = total

    def drop(self, gradient: _Gradient) -> None:
        if not gradient.holders:
            self.live -= gradient.nbytes
            gradient.nbytes = 0

    def run(self, op: Op) -> None:
        incoming = self.gradients.pop(id(op.out))
        self.made += op.gradients
        needed = {id(t): t for t in op.ins if t.requires}.values()
        outgoing = []
        for tensor in needed:
            if op.alias and tensor.nbytes == incoming.nbytes:
                outgoing.append((tensor, incoming))
            else:
                outgoing.append((tensor, _Gradient(tensor.nbytes)))
                self.live += tensor.nbytes
        self.note(op.backward_tmp)
        incoming.holders -= 1
        for tensor, gradient in outgoing:
            self.give(tensor, gradient)
            self.drop(gradient)
        self.drop(incoming)
        for key in {id(t) for t in op.saved}:
            self.savers[key] -= 1
            if not self.savers[key]:
                self.live -= self.saved[key]


def backward(tape: Tape, *, gradient: bool = True) -> Backward:
    """In reverse order, as autograd runs; an operation frees what it saved when it is done. ``gradient`` says whether
    one for the output comes in; a loss has none of weight."""
    state = _Pass(tape)
    start = _Gradient(tape.out.nbytes if gradient else 0)
    start.holders = 1
    state.live += start.nbytes
    state.gradients[id(tape.out)] = start
    state.note()
    everything = state.live - start.nbytes
    waiting: int | None = None
    for op in reversed(tape.ops):
        if id(op.out) in state.gradients:
            if op.saved and waiting is None:
                waiting = state.live - everything
            state.run(op)
    return Backward(*state.peak, state.made, waiting or 0, state.most)
