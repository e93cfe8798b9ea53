"""The activations of one rank of a pipeline: its chunks' tapes, and how many micro-batches are in flight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from estimators.activations.chain import Network
from estimators.activations.op import Tensor
from estimators.activations.op_tape import Tape
from estimators.activations.phases import Activations, Flown, PhaseBytes
from estimators.activations.scope import Scope
from estimators.activations.step import Step
from estimators.parallel.degrees import chunks
from estimators.parallel.local import Stage, staged
from estimators.parallel.schedule import passes

if TYPE_CHECKING:
    from estimators.models.model import Model
    from estimators.training import Training

RunStage = Callable[["Model", Callable[[Network, Step], Network]], tuple[Activations | None, str]]


def activations(model: Model, stage: Stage, training: Training, run: RunStage) -> tuple[Activations | None, str]:
    """Of the rank, or None and why they are not known. ``run(model, part)`` gives one chunk's."""
    found = []
    for chunk in range(len(stage.chunks)):
        ran, why = run(staged(model, stage, chunk), _part(stage, chunk))
        if ran is None:
            return None, why
        found.append(ran)
    order = list(passes(training.schedule, stage.rank, stage.stages, chunks(training), training.accumulate))
    plain = _flown(found, order)
    return plain._replace(kept=_flown([one.kept or one for one in found], order)), ""


def _part(stage: Stage, chunk: int) -> Callable[[Network, Step], Network]:
    """What makes the network of a chunk: layers between what is received and what is sent. A result that is sent is
    kept until its gradient has come (PipelineStage.fwd_cache)."""
    start, stop = stage.chunks[chunk]
    first, last = stage.first and chunk == 0, stage.last and chunk == len(stage.chunks) - 1

    def part(network: Network, step: Step) -> Network:
        if network.encoder:
            raise KeyError("pipeline of an encoder and a decoder")
        scratch = Tape(step, Scope(()), Tensor(0, step.item, requires=False))
        whole = network.embed(scratch)

        def received(t: Tape) -> Tensor:
            return t.op([Tensor(0, whole.item)], whole.numel, whole.item)

        def sent(t: Tape, x: Tensor) -> Tensor:
            return t.op([x], 0, saves=[x])

        return network._replace(
            embed=network.embed if first else received,
            layers=network.layers[start:stop],
            masks=tuple(m.between(start, stop) for m in network.masks),
            head=network.head if last else sent,
        )

    return part


class _Most(NamedTuple):
    forward: int = 0
    loss: int = 0
    backward: PhaseBytes = PhaseBytes(0, 0)
    accumulated: int = 0
    saved: int = 0


def _flown(found: list[Activations], order: Sequence[tuple[bool, int]]) -> Activations:
    """The fullest moments over all passes: what the micro-batches in flight have saved is there beside the one at
    work."""
    live, most = 0, _Most()
    for forward, chunk in order:
        one = found[chunk]
        if forward:
            most = most._replace(
                forward=max(most.forward, live + one.forward.activations),
                loss=max(most.loss, live + one.loss.activations),
            )
            live += one.saved
            most = most._replace(saved=max(most.saved, live))
        else:
            live -= one.saved
            moment = one.backward._replace(activations=one.backward.activations + live)
            most = most._replace(
                backward=max(most.backward, moment, key=sum),
                accumulated=max(most.accumulated, live + one.accumulated.activations),
            )
    walked = tuple(one.walked for one in found if one.walked is not None)
    made = sum(one.accumulated.gradients for one in found)
    return Activations(
        most.saved,
        PhaseBytes(most.forward, 0),
        PhaseBytes(most.loss, 0),
        most.backward,
        PhaseBytes(most.accumulated, made),
        output=sum(one.output for one in found),
        away=sum(one.away for one in found),
        flown=Flown(walked, tuple(order)) if len(walked) == len(found) else None,
    )
