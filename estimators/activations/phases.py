"""A model's segments one after the other, forward and backward: how much is alive at the fullest moment of each phase.

Under checkpointing a layer keeps its input, and with ``selective`` the results of its matrix products and of fused
attention; it runs again when the first of its saved tensors is asked for.
"""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Callable
from typing import Any, NamedTuple

from estimators.activations.blocks import Network
from estimators.activations.op import Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.recorded import Recorded
from estimators.activations.scope import Parameters, Scope
from estimators.activations.simulate import Again, Backward, Forward, again, backward, forward
from estimators.activations.step import Step

EVERY = "every-"
#: checkpointing of one layer -> what its first forward pass keeps (:func:`~.simulate.forward`)
KEEPING = {"none": "saved", "full": "nothing", "selective": "products", "selective-2": "alternate"}


class PhaseBytes(NamedTuple):
    """Bytes alive at the fullest moment of a phase: activations of every kind, and gradients of parameters."""

    activations: int
    gradients: int


class Activations(NamedTuple):
    """``saved`` is what the forward pass leaves for the backward pass, the loss included (of a checkpointed layer its
    input, and what selective checkpointing keeps); then the fullest moment of each phase. ``accumulated`` is the
    fullest moment of a backward pass that adds to gradients which are all there already, ``released`` of one
    that frees each as it is made. ``copies`` are autocast's
    copies of weights at the end of the forward pass, which the moments of forward and loss contain (the former without
    the head's). ``walked`` is what they follow from, for whoever asks for the order of it all. ``output`` are bytes
    that live as long as the model's output, and ``kept`` is the same step with an output that lives until the backward
    pass is over. ``away`` are saved bytes on the host. ``recorded`` is in place of ``walked`` where the
    step was traced (:mod:`estimators.traced`), and ``notes`` are sentences on how; ``flown`` where it is that of a rank
    of a pipeline."""

    saved: int
    forward: PhaseBytes
    loss: PhaseBytes
    backward: PhaseBytes
    accumulated: PhaseBytes
    copies: int = 0
    body_copies: int = 0
    walked: "Walked | None" = None
    output: int = 0
    kept: "Activations | None" = None
    released: PhaseBytes = PhaseBytes(0, 0)
    away: int = 0
    notes: tuple[str, ...] = ()
    recorded: Recorded | None = None
    flown: "Flown | None" = None


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

    def backward(self, waited: frozenset[str]) -> Backward:
        if waited not in self.backwards:
            self.backwards[waited] = backward(self.tape, gradient=self.kind != "loss", waited=waited)
        return self.backwards[waited]


class Walked(NamedTuple):
    """The segments in their order, and the bytes of tables and masks that they are called with."""

    segments: tuple[Segment, ...]
    tables: int
    masks: int


class Flown(NamedTuple):
    """The chunks of a rank of a pipeline, and the order of passes through them: ``(whether forward, chunk)``."""

    chunks: tuple[Walked, ...]
    order: tuple[tuple[bool, int], ...]


class _Chain:
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
        self.ends += 1


def _like(t: Tensor) -> Tensor:
    return Tensor(t.numel, t.item, t.requires)


def composed(network: Network, step: Step, checkpointing: str, parameters: Parameters) -> Activations:
    """``checkpointing``: ``none``, ``full``, ``selective`` or ``every-K``."""
    chain = _Chain(step, checkpointing, parameters)
    tables, masks = network.tables, network.masks
    if network.encoder:
        chain.network(network.encoder)
        head = network.encoder.head

        def share_output(tape: Tape) -> Tensor:
            tape.shares["memory"] = head(tape, tape.x)
            return tape.shares["memory"]

        chain.append(chain.run(share_output, parameters.root(chain.ends)))
        tables, masks = tables + network.encoder.tables, masks + network.encoder.masks
    chain.network(network)
    ran = []
    for outputs in (step.outputs, True):
        chain.step = step._replace(outputs=outputs)
        loss = chain.run(lambda tape: network.head(tape, tape.x), parameters.root(-1), "loss")
        ran.append(_walk([*chain.segments, loss], tables, masks, step.offload))
    return ran[0]._replace(kept=ran[1])


def _kept_shared(segments: list[Segment]) -> set[str]:
    """Shared tensors that stay for the backward pass: saved by a segment, or what a checkpointed one is called with."""
    kept: set[str] = set()
    for s in segments:
        named = {**s.tape.shared, **s.tape.shares}
        kept |= {name for name, t in named.items() if id(t) in s.forward.keeps}
        kept |= set(s.reads) if s.checkpointed else set()
    return kept


def _walk(segments: list[Segment], tables: int, masks: int, offload: bool = False) -> Activations:
    """Forward through the segments, then backward, noting the fullest moment of each phase. ``offload``: what layers
    keep goes to the host, and comes back when the layer's backward pass begins."""
    stays = _kept_shared(segments)
    called = masks * any(s.checkpointed for s in segments)  # what a layer is called with stays until it has run again
    held = top = tables + called
    passing = {"masks": masks - called}  # shared tensors that nobody keeps
    out_kept = False
    before: list[int] = []  # bytes kept ahead of each segment
    away = copies = in_loss = cached = (
        0  # ``cached``: copies of weights, which checkpointing does not keep but autocast does
    )
    for s in segments:
        before.append(held)
        loss = s.kind == "loss"
        copies += s.tape.cached * (not loss)
        cached += s.tape.cached * s.checkpointed
        passing = {name: n for name, n in passing.items() if name == "memory"} if loss else passing
        alive = held + sum(passing.values()) + (0 if out_kept else s.tape.x.nbytes) + s.forward.peak + cached
        in_loss, top = (alive, top) if loss else (0, max(top, alive))
        more = s.forward.kept + (s.tape.x.nbytes if s.keeps_input and not out_kept else 0)
        out_kept = s.keeps_output
        more += s.out if out_kept else 0
        away, held = (away + more, held) if offload and s.kind == "layer" else (away, held + more)
        passing = {} if "memory" in s.tape.shares else passing
        for name, tensor in s.tape.shares.items():
            if name in stays:
                held += tensor.nbytes
            else:
                passing[name] = tensor.nbytes
    fullest, accumulated, made, released = _backward(segments, before)
    # Tables that only checkpointed layers are called with are alive, but not saved.
    unsaved = called + tables * all(s.checkpointed for s in segments if s.kind == "layer")
    return Activations(
        held + away - unsaved,
        PhaseBytes(top, 0),
        PhaseBytes(in_loss, 0),
        fullest,
        PhaseBytes(accumulated, made),
        copies + segments[-1].tape.cached,
        copies,
        None if offload else Walked(tuple(segments), tables, masks),
        sum(t.nbytes for s in segments for t in s.tape.outlives),
        None,
        released,
        away,
    )


def _backward(segments: list[Segment], before: list[int]) -> tuple[PhaseBytes, int, int, PhaseBytes]:
    """The fullest moment, that of activations alone, the bytes of parameters' gradients at the end, and the fullest
    moment where gradients go at once."""
    made, fullest, accumulated, released = 0, PhaseBytes(0, 0), 0, PhaseBytes(0, 0)
    outlives = sum(t.nbytes for s in segments for t in s.tape.outlives)  # and are there in every moment
    before = [n + outlives for n in before]
    table = max((s.table for s in segments), default=0)
    waited: dict[str, int] = {}  # gradients of shared tensors that wait for the segment that made them
    for s, ahead in zip(reversed(segments), reversed(before), strict=True):
        run = s.backward(frozenset(waited))
        for name in s.tape.shares:
            waited.pop(name, None)
        left = ahead + sum(waited.values())
        if s.checkpointed:
            # The input and what else was kept is there; gradients wait while the layer runs again.
            x = s.tape.x.nbytes
            rerun = left + x + s.forward.kept + run.waiting + s.again.peak
            fullest = max(fullest, PhaseBytes(rerun, made), key=sum)
            accumulated = max(accumulated, rerun + table)
            released = max(released, PhaseBytes(rerun, table), key=sum)
            left += s.again.left + x * (not s.saves_input)
        fullest = max(fullest, PhaseBytes(left + run.activations, made + run.gradients), key=sum)
        # Of a tied table the head's half waits for the embedding's, where both halves and their sum are there.
        waiting = table * (s.kind != "loss") + s.table
        accumulated = max(accumulated, left + run.most + waiting)
        released = max(released, PhaseBytes(left + run.released[0], run.released[1] + waiting), key=sum)
        made += run.total
        waited |= {
            name: s.tape.shared[name].nbytes for name in s.reads if s.tape.shared[name].requires and name not in waited
        }
    return fullest, accumulated, made, released


def _table(tape: Tape) -> int:
    """An operation whose source has no elements is an embedding; a tied one counts its gradient as temporary."""
    sources = (op for op in tape.ops if op.ins and not op.ins[0].numel and not op.gradients)
    return max((op.backward_tmp for op in sources), default=0)
