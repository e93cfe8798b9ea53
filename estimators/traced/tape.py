"""The figures of a traced step."""

from __future__ import annotations

from estimators.activations.phases import Activations, PhaseBytes
from estimators.activations.recorded import BACKWARD, FREE, GRADIENT, INSIDE, LOSS, MARK, TAKE, Recorded


def activations(step: Recorded, kept: bool = False) -> Activations:
    """``kept``: the model's output lives until the backward pass is over."""
    plain, whole = _summed(step), _summed(step.with_outputs())
    return (whole if kept else plain)._replace(kept=whole)


def _summed(step: Recorded) -> Activations:
    sizes: dict[int, int] = {}
    gradients: set[int] = set()
    live = made = saved = most = phase_most = 0
    forward = loss = 0
    fullest, released = PhaseBytes(0, 0), PhaseBytes(0, 0)
    phase = -1
    for code, slot, nbytes in step.events:
        inside = 0
        if code == TAKE:
            sizes[slot] = nbytes
            live += nbytes
        elif code == FREE:
            if slot in gradients:
                made -= sizes[slot]
            else:
                live -= sizes[slot]
        elif code == INSIDE:
            inside = nbytes
        elif code == GRADIENT:
            if slot in sizes and slot not in gradients:
                gradients.add(slot)
                live -= sizes[slot]
                made += sizes[slot]
                released = max(released, PhaseBytes(live, sizes[slot]), key=sum)
        else:
            if phase < LOSS <= slot:
                forward = phase_most
            if phase < BACKWARD <= slot:
                loss, saved = phase_most, live
            phase, phase_most = slot, live
        now = live + inside
        phase_most = max(phase_most, now)
        if phase == BACKWARD:
            most = max(most, now)
            fullest = max(fullest, PhaseBytes(now, made), key=sum)
            released = max(released, PhaseBytes(now, 0), key=sum)
    total = sum(sizes[slot] for slot in gradients)
    left = sum(sizes[slot] for slot in step.outputs if step.events and _after_end(step, slot))
    return Activations(
        saved,
        PhaseBytes(forward, 0),
        PhaseBytes(loss, 0),
        fullest,
        PhaseBytes(most, total),
        output=left,
        released=released,
        recorded=step,
    )


def _after_end(step: Recorded, slot: int) -> bool:
    """Whether it goes at the very end."""
    for code, other, _ in reversed(step.events):
        if code == MARK:
            return False
        if code == FREE and other == slot:
            return True
    return False
