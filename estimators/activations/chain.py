"""A model's segments in the order in which they run: embedding, layers, head.

Under checkpointing a layer keeps its input, and with ``selective`` the results of its matrix products and of fused
attention; it runs again when the first of its saved tensors is asked for.
"""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Callable
from typing import Any, NamedTuple

from estimators.activations.op import Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.scope import Parameters, Scope
from estimators.activations.simulate import Again, Backward, Forward, again, backward, forward
from estimators.activations.step import Step

Layer = Callable[[Tape, Tensor], Tensor]


class Mask(NamedTuple):
    """Made once for the layers that are called with it, which do not keep it; ``layers``: their indices, in order, or
    None for all."""

    nbytes: int
    layers: tuple[int, ...] | None = None

    def between(self, start: int, stop: int) -> "Mask":
        """For a model of some of the layers."""
        of = self.layers
        return self if of is None else self._replace(layers=tuple(i - start for i in of if start <= i < stop))


class Network(NamedTuple):
    """A model as segments: ``embed(tape)``, layers by kind in their order, ``head(tape, x)`` down to the loss.
    ``tables`` are bytes made once that every layer reads and keeps. An ``encoder`` runs first; its head's result is the
    shared tensor ``memory``."""

    embed: Callable[[Tape], Tensor]
    layers: tuple[tuple[str, Layer], ...]
    head: Layer
    tables: int = 0
    encoder: "Network | None" = None
    masks: tuple[Mask, ...] = ()


def alike(layer: Layer, count: int, kind: str = "layer") -> tuple[tuple[str, Layer], ...]:
    """The same layer ``count`` times."""
    return ((kind, layer),) * count


def called_with(nbytes: int) -> tuple[Mask, ...]:
    """One mask for all layers, or none without bytes."""
    return (Mask(nbytes),) if nbytes else ()


EVERY = "every-"
#: checkpointing of one layer -> what its first forward pass keeps (:func:`~.simulate.forward`)
KEEPING = {"none": "saved", "full": "nothing", "selective": "products", "selective-2": "alternate"}


class Segment(NamedTuple):
    """A part of the model, run forward. ``checkpointing`` is the layer's own: ``none``, ``full`` or ``selective``.
    ``reads`` are the names of the shared tensors that it is called with; ``saves_input`` says whether its input is
    saved; ``table`` are the bytes of the gradient of an embedding which is the head's weight too, that the segment adds
    to the head's."""

    tape: Tape
    checkpointing: str
    forward: Forward
    again: Again
    kind: str  # ``layer``, ``loss``, or empty
    #: frozenset of shared tensors that have a gradient already -> the backward pass
    backwards: dict[frozenset[str], Backward]
    reads: tuple[str, ...]
    saves_input: bool
    table: int

    @property
    def checkpointed(self) -> bool:
        return self.checkpointing != "none"

    @property
    def keeps_input(self) -> bool:
        return self.checkpointed or id(self.tape.x) in self.forward.keeps

    @property
    def keeps_output(self) -> bool:
        return not self.checkpointed and self.tape.out is not self.tape.x and id(self.tape.out) in self.forward.keeps

    @property
    def out(self) -> int:
        """Bytes of the result, unless it is a shared tensor."""
        return 0 if id(self.tape.out) in self.tape.elsewhere else self.tape.out.nbytes

    @property
    def pinned(self) -> int:
        """Bytes that live as long as the graph, other segments' aside."""
        boundary = self.tape.boundary
        return sum(n for key, n in {id(t): t.nbytes for t in self.tape.pinned}.items() if key not in boundary)

    def backward(self, waited: frozenset[str]) -> Backward:
        if waited not in self.backwards:
            self.backwards[waited] = backward(self.tape, gradient=self.kind != "loss", waited=waited)
        return self.backwards[waited]


class Called(NamedTuple):
    """A mask. A checkpointed segment keeps what it is called with until it has run again: ``first`` is the first such
    segment, the last one to run again; None where there is none, and the mask goes when the layers have run."""

    nbytes: int
    first: int | None

    def waits(self, at: int) -> bool:
        """Whether it is there in the backward pass of segment ``at``."""
        return self.first is not None and self.first <= at


class Chain:
    """Segments in the order in which they run. A layer of a kind that was run already, with an input of the same kind
    and checkpointed in the same way, is not run again: every layer after the first costs nothing."""

    def __init__(self, step: Step, checkpointing: str, parameters: Parameters) -> None:
        self.step = step
        self.parameters = parameters
        self.ends = 0  # how many runs of blocks lie behind
        self.checkpointing = checkpointing
        self.every = int(checkpointing.removeprefix(EVERY)) if checkpointing.startswith(EVERY) else 1
        self.layers = 0
        self.x = Tensor(0, step.item, requires=False)
        self.shared: dict[str, Tensor] = {}
        self.segments: list[Segment] = []
        self.seen: dict[tuple[Any, ...], Segment] = {}
        self.masks: list[Called] = []

    @property
    def next_layer(self) -> str:
        """Checkpointing of the next layer. ``every-K``: the first layer and every K-th after it."""
        if self.every > 1:
            return "none" if self.layers % self.every else "full"
        return self.checkpointing

    def run(self, body: Callable[[Tape], Tensor], scope: Scope, kind: str = "", checkpointing: str = "none") -> Segment:
        tape = Tape(self.step, scope, self.x)
        tape.input_gradients = self.checkpointing != "none"
        tape.shared = {name: _like(t) for name, t in self.shared.items()}
        tape.out = body(tape)
        keeping = KEEPING[checkpointing]
        rerun = Again(0, 0) if checkpointing == "none" else again(tape, keeping)
        ins = {id(t) for op in tape.ops for t in op.ins}
        reads = tuple(name for name, t in tape.shared.items() if id(t) in ins)
        saves_input = any(t is tape.x for op in tape.ops for t in op.saved)
        return Segment(tape, checkpointing, forward(tape, keeping), rerun, kind, {}, reads, saves_input, _table(tape))

    def append(self, segment: Segment) -> None:
        self.segments.append(segment)
        self.shared |= segment.tape.shares
        self.x = _like(segment.tape.out)

    def network(self, network: Network) -> None:
        self.x = Tensor(0, self.step.item, requires=False)
        self.append(self.run(network.embed, self.parameters.root(self.ends)))
        if self.checkpointing != "none":
            self.x.requires = True  # enable_input_require_grads: a checkpointed layer without it would get no gradient
        start = len(self.segments)
        for kind, layer in network.layers:
            block, how = self.parameters.block(self.layers), self.next_layer
            key = (kind, self.x.requires, how, block)
            if key not in self.seen:
                self.seen[key] = self.run(
                    lambda tape, layer=layer: layer(tape, tape.x),  # type: ignore[misc]
                    Scope(block),
                    "layer",
                    how,
                )
            self.layers += 1
            self.append(self.seen[key])
        layers = range(len(network.layers))
        for mask in network.masks:
            readers = (start + i for i in (layers if mask.layers is None else mask.layers))
            self.masks.append(Called(mask.nbytes, next((i for i in readers if self.segments[i].checkpointed), None)))
        self.ends += 1


def _like(t: Tensor) -> Tensor:
    return Tensor(t.numel, t.item, t.requires)


def _table(tape: Tape) -> int:
    """An operation whose source has no elements is an embedding; a tied one counts its gradient as temporary."""
    sources = (op for op in tape.ops if op.ins and not op.ins[0].numel and not op.gradients)
    return max((op.backward_tmp for op in sources), default=0)
