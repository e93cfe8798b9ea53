"""A model's segments, forward and backward: how much is alive at the fullest moment of each phase."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Sequence
from typing import NamedTuple

from estimators.activations.chain import Called, Chain, Network, Segment
from estimators.activations.op import Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.recorded import Recorded
from estimators.activations.scope import Parameters
from estimators.activations.step import Step


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


class Walked(NamedTuple):
    """The segments in their order, and the bytes of tables and the masks that they are called with."""

    segments: tuple[Segment, ...]
    tables: int
    masks: tuple[Called, ...]

    @property
    def called(self) -> int:
        """Bytes of masks that wait for checkpointed segments."""
        return _waiting(self.masks)


class Flown(NamedTuple):
    """The chunks of a rank of a pipeline, and the order of passes through them: ``(whether forward, chunk)``."""

    chunks: tuple[Walked, ...]
    order: tuple[tuple[bool, int], ...]


def composed(network: Network, step: Step, checkpointing: str, parameters: Parameters) -> Activations:
    """``checkpointing``: ``none``, ``full``, ``selective`` or ``every-K``."""
    chain = Chain(step, checkpointing, parameters)
    tables = network.tables
    if network.encoder:
        chain.network(network.encoder)
        head = network.encoder.head

        def share_output(tape: Tape) -> Tensor:
            tape.shares["memory"] = head(tape, tape.x)
            return tape.shares["memory"]

        chain.append(chain.run(share_output, parameters.root(chain.ends)))
        tables += network.encoder.tables
    chain.network(network)
    ran = []
    for outputs in (step.outputs, True):
        chain.step = step._replace(outputs=outputs)
        loss = chain.run(lambda tape: network.head(tape, tape.x), parameters.root(-1), "loss")
        ran.append(_walk([*chain.segments, loss], tables, chain.masks, step.offload))
    return ran[0]._replace(kept=ran[1])


def _kept_shared(segments: list[Segment]) -> set[str]:
    """Shared tensors that stay for the backward pass: saved by a segment, or what a checkpointed one is called with."""
    kept: set[str] = set()
    for s in segments:
        named = {**s.tape.shared, **s.tape.shares}
        kept |= {name for name, t in named.items() if id(t) in s.forward.keeps}
        kept |= set(s.reads) if s.checkpointed else set()
    return kept


def _waiting(masks: Sequence[Called]) -> int:
    return sum(mask.nbytes for mask in masks if mask.first is not None)


def _walk(segments: list[Segment], tables: int, masks: Sequence[Called], offload: bool = False) -> Activations:
    """Forward through the segments, then backward, noting the fullest moment of each phase. ``offload``: what layers
    keep goes to the host, and comes back when the layer's backward pass begins."""
    stays = _kept_shared(segments)
    called = _waiting(masks)
    held = top = tables + called
    passing = {"masks": sum(mask.nbytes for mask in masks) - called}  # shared tensors that nobody keeps
    out_kept = False
    before: list[int] = []  # bytes that are there in the backward pass of each segment, kept ahead of it
    away = copies = in_loss = cached = (
        0  # ``cached``: copies of weights, which checkpointing does not keep but autocast does
    )
    for at, s in enumerate(segments):
        before.append(held - sum(m.nbytes for m in masks if m.first is not None and not m.waits(at)))
        loss = s.kind == "loss"
        copies += s.tape.cached * (not loss)
        cached += s.tape.cached * s.checkpointed
        passing = {name: n for name, n in passing.items() if name == "memory"} if loss else passing
        alive = held + sum(passing.values()) + (0 if out_kept else s.tape.x.nbytes) + s.forward.peak + cached
        in_loss, top = (alive, top) if loss else (0, max(top, alive))
        more = s.forward.kept + (s.tape.x.nbytes if s.keeps_input and not out_kept else 0)
        out_kept = s.keeps_output
        more += s.out if out_kept else 0
        goes = (more - s.pinned) * (offload and s.kind == "layer")
        away, held = away + goes, held + more - goes
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
        None if offload else Walked(tuple(segments), tables, tuple(masks)),
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
    pinned = 0  # by nodes of segments whose backward pass is over
    waited: dict[str, int] = {}  # gradients of shared tensors that wait for the segment that made them
    for s, ahead in zip(reversed(segments), reversed(before), strict=True):
        run = s.backward(frozenset(waited))
        for name in s.tape.shares:
            waited.pop(name, None)
        left = ahead + sum(waited.values()) + pinned
        pinned += s.pinned
        if s.checkpointed:
            # The input and what else was kept is there; gradients wait while the layer runs again.
            x = s.tape.x.nbytes
            rerun = left + x + s.forward.kept + run.waiting + s.again.peak
            fullest = max(fullest, PhaseBytes(rerun, made), key=sum)
            accumulated = max(accumulated, rerun + table)
            released = max(released, PhaseBytes(rerun, table), key=sum)
            left += s.again.left + x * (not s.saves_input) + s.pinned
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
