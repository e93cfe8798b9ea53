"""From measurements to what a person would say. One function per cause; thresholds are named, with their reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite, log10
from statistics import fmean, median

from memopt.diagnosis.muon_rates import muon
from memopt.diagnosis.readings import LARGE_STEP, OUTLIER, Finding, GroupReading, History, Reading

#: From here on a step is no correction of the weights any more.
HALF = 0.5
#: From here on one step replaces them.
REPLACED = 1.0
#: A loss that is this many times what it was is not noise.
JUMP = 1.2
#: Share of updates that round to nothing: more than half of the training does not happen.
LOST = 0.5
#: What is stored over what 32 bits would hold, or its inverse.
FROZEN = 2.0
#: Relative error of a moment that is no approximation any more; of 4 bits 0.3 to 0.5 is the ordinary error.
UNSTABLE = {"4bit": 1.0}
UNSTABLE_DEFAULT = 0.5
#: Steps within which a warm-up would have had its effect.
FIRST_STEPS = 10
#: Losses without which nothing is said about their course.
ENOUGH = 40
SIXTEEN_BIT = ("bfloat16", "float16")


def find(h: History) -> list[Finding]:
    """The likeliest first. A rate that is wrong explains what comes after it, so it is said alone."""
    for causes in _IN_ORDER:
        found = [finding for cause in causes for finding in cause(h)]
        if found:
            return found
    return []


def nonfinite(h: History) -> Iterator[Finding]:
    """NaN or Inf: by the data of one batch if all was ordinary before, else by the rate."""
    first_loss = next((step for step, loss in h.losses if not isfinite(loss)), None)
    event = h.nonfinite[0] if h.nonfinite else None
    if first_loss is None and event is None:
        return
    began = min(step for step in (first_loss, event.step if event else None) if step is not None)
    before = [r for r in h.readings if r.step < began]
    names = ", ".join(event.names[:3]) if event and event.skipped else ""
    where = f" in the gradient of {names}" + (" and others" if event and len(event.names) > 3 else "") if names else ""
    skipped = "; the step was skipped and nothing was changed" if event and event.skipped else ""
    ratio = _largest_ratio(before[-2:])
    grown = _grown(h, began)
    if (ratio is not None and ratio > HALF) or grown:
        moved = "the loss was rising" if grown else f"a step moved the weights by {ratio:.0%} of their size"
        yield Finding(
            "rate",
            f"NaN or Inf{where} from step {began} on{skipped}, and before it {moved}: lower the rate (ten times), clip "
            "the gradients to a norm of 1, or raise eps",
            began,
        )
        return
    again = len(h.nonfinite) if event and event.skipped else 0
    if again > 3:
        yield Finding(
            "non-finite gradients",
            f"{again} steps had NaN or Inf{where}, the first at step {began}{skipped}: half precision that overflows, "
            "a division by an empty target, or log(0) in the loss",
            began,
        )
        return
    yield Finding(
        "non-finite batch",
        f"NaN or Inf{where} at step {began}{skipped}; losses, gradients and updates before it were ordinary: look at "
        "the batch of that step (values that are not numbers, no target that counts, log(0) in the loss)"
        + ("" if skipped else ". With nonfinite='skip' such a step does not happen and the parameters are named"),
        began,
    )


def group_rate(h: History) -> Iterator[Finding]:
    """One group has a rate of another order, and moves its weights accordingly."""
    for reading in h.readings:
        if len(reading.groups) < 2:
            return
        for g in reading.groups:
            others = [o for o in reading.groups if o.group != g.group and o.lr < g.lr / OUTLIER and o.lr > 0]
            ratios = [o.update_ratio for o in others if o.update_ratio]
            if not g.update_ratio or not ratios or g.update_ratio < LARGE_STEP:
                continue
            typical = median(ratios)
            if g.update_ratio > OUTLIER * typical:
                yield Finding(
                    "rate of a group",
                    f"group {g.group} ({g.names}) has lr={g.lr:.3g}, {g.lr / median(o.lr for o in others):.0f} times "
                    f"that of others, and step {reading.step} moved its weights by {g.update_ratio:.0%} of their size "
                    f"where the others moved by {typical:.1%}: is this rate meant for these parameters? "
                    "(memopt.describe shows who is where)",
                    reading.step,
                )
                return


def rate(h: History) -> Iterator[Finding]:
    """Steps as large as the weights, or large steps in spite of a warm-up, and a loss that rises, if it is known."""
    worst = _worst(h.readings)
    if worst is None:
        return
    step, g = worst
    ratio = g.update_ratio or 0.0
    large = ratio > (LARGE_STEP if _ramped(h.readings) else REPLACED)
    if (large and _rising(h)) or (not h.losses and ratio > REPLACED and step > 1):
        peak = max(o.lr for r in h.readings for o in r.groups)
        loss = f", and the loss went from {_start(h):.3g} to {_recent(h):.3g}" if h.losses else ""
        yield Finding(
            "rate",
            f"the rate is too high: at lr={g.lr:.3g} of {peak:.3g}, step {step} moved the weights of group {g.group} "
            f"by {ratio:.0%} of their size (0.01 % to 1 % is usual){loss}. Lower it by a factor of about "
            f"{10 ** max(round(log10(ratio / LARGE_STEP)), 1):,}; memopt lr-find looks for the right one",
            step,
        )


def warm_up(h: History) -> Iterator[Finding]:
    """The full rate from the first step on, large early steps, and a loss that jumped."""
    opening = [r for r in h.readings if r.step <= FIRST_STEPS]
    worst = _worst(opening)
    if worst is None or _ramped(h.readings) or worst[1].update_ratio is None or len(h.losses) < 2:
        return
    start = h.losses[0][1]
    jumped = max((loss for step, loss in h.losses if step <= FIRST_STEPS), default=start)
    if worst[1].update_ratio > LARGE_STEP and jumped > JUMP * start:
        yield Finding(
            "warm-up",
            f"there is no warm-up: the first step has the full rate {worst[1].lr:.3g}, moved the weights by "
            f"{worst[1].update_ratio:.0%} of their size while the second moment had seen one gradient, and the loss "
            f"jumped from {start:.3g} to {jumped:.3g}. Let the rate rise over the first 2 % to 10 % of the steps "
            "(memopt.schedule(..., warmup=0.05)), or use radam",
            worst[0],
        )


def rounding(h: History) -> Iterator[Finding]:
    """16-bit weights whose updates are smaller than half a unit in the last place."""
    if not h.readings:
        return
    peak = max((g.lr for r in h.readings for g in r.groups if isfinite(g.lr)), default=0.0)
    lost: dict[int, float] = {}
    for g in h.readings[-1].groups:
        course = [
            o.lost
            for r in h.readings
            for o in r.groups
            if o.group == g.group and o.lost is not None and not o.lr < peak / 100
        ]
        if g.dtype in SIXTEEN_BIT and course and median(course) >= LOST:
            lost[g.group] = median(course)
    if lost:
        first = next(g for g in h.readings[-1].groups if g.group in lost)
        more = f" and {len(lost) - 1} more groups" if len(lost) > 1 else ""
        yield Finding(
            "rounding",
            f"{lost[first.group]:.0%} of the updates of group {first.group} ({first.names}){more} are rounded away: at "
            f"a rate of {peak:.3g} they are smaller than half a step of {first.dtype}. Keep what is lost (+kahan, "
            "+split or +stochastic behind the rule), train fp32 weights, or raise the rate",
            h.readings[-1].step,
        )


def frozen(h: History) -> Iterator[Finding]:
    """A second moment that does not follow its gradients."""
    if not h.readings:
        return
    off = [
        m
        for m in h.readings[-1].moments
        if m.ratio is not None and m.format != "factored" and not 1 / FROZEN < m.ratio < FROZEN
    ]
    if off:
        worst = max(off, key=lambda m: max(m.ratio or 0.0, 1 / (m.ratio or 1e-30)))
        beta = f" at b2={h.beta2:g} it should change by {1 - h.beta2:.2g} of itself in a step, and" if h.beta2 else ""
        names = ", ".join(dict.fromkeys(m.parameter for m in off[:4]))
        yield Finding(
            "frozen second moment",
            f"{worst.moment} of {worst.parameter} is {worst.ratio:.2g} times what 32 bits would hold:{beta} "
            f"{worst.format} rounds that away. The steps of {names} are off by the root of it; keep them in 32bit, or "
            "in 8bit or bf16 of the native engine, which round stochastically",
            h.readings[-1].step,
        )


def unstable(h: History) -> Iterator[Finding]:
    """Stored moments that are no approximation any more, in two readings: after a gradient much larger than the others
    one of 4 bits is off by as much as it is large for as long as the block remembers it."""
    if not h.readings:
        return
    last, before = (
        {(m.parameter, m.moment): m for m in r.moments if m.error > UNSTABLE.get(m.format, UNSTABLE_DEFAULT)}
        for r in (h.readings[-1], h.readings[-2:][0])
    )
    off = [m for key, m in last.items() if key in before and m.format not in ("factored", "32bit", "float32")]
    if off:
        patterns = ", ".join(f"{name!r}: '32bit'" for name in dict.fromkeys(m.parameter for m in off))
        yield Finding(
            "unstable state",
            f"{off[0].moment} of {off[0].parameter} is {off[0].error:.0%} from its 32-bit shadow: keep these in 32 "
            f"bits, overrides={{{patterns}}}",
            h.readings[-1].step,
        )


def destroyed(h: History) -> Iterator[Finding]:
    """A loss that is lastingly above where it began."""
    if _rising(h) and len(h.losses) >= ENOUGH:
        yield Finding(
            "worse than it began",
            f"the loss began at {_start(h):.3g} and is {_recent(h):.3g} now: what the model knew is being lost. Take "
            "a rate ten times lower, a warm-up, and no decay of norms, biases and embeddings (memopt.param_groups)",
            h.losses[-1][0],
        )


def flat(h: History) -> Iterator[Finding]:
    """A loss that does not move."""
    if len(h.losses) < 2 * ENOUGH:
        return
    quarter = len(h.losses) // 4
    first, last = (fmean(x for _, x in part) for part in (h.losses[:quarter], h.losses[-quarter:]))
    ratios = [g.update_ratio for g in h.readings[-1].groups if g.update_ratio is not None] if h.readings else []
    small = bool(ratios) and max(ratios) < 1e-5
    if last > 0.99 * first and small:
        yield Finding(
            "flat",
            f"the loss does not fall ({first:.3g} in the first quarter of the steps, {last:.3g} in the last), and a "
            f"step moves the weights by {max(ratios):.0e} of their size: the rate is too low, or still in its warm-up",
            h.losses[-1][0],
        )
    elif last > 0.99 * first:
        yield Finding(
            "flat",
            f"the loss does not fall ({first:.3g} in the first quarter of the steps, {last:.3g} in the last) although "
            "the weights move: look at the rate (memopt lr-find), the warm-up and the targets",
            h.losses[-1][0],
        )


#: Each row only if those before it found nothing.
_IN_ORDER: tuple[tuple[Callable[[History], Iterator[Finding]], ...], ...] = (
    (nonfinite,),
    (muon,),
    (group_rate,),
    (rate,),
    (warm_up,),
    (frozen, rounding),
    (unstable,),
    (destroyed,),
    (flat,),
)


def _worst(readings: list[Reading]) -> tuple[int, GroupReading] | None:
    """The step and the group of the largest update-to-weight ratio."""
    found = [(r.step, g) for r in readings for g in r.groups if g.update_ratio is not None and isfinite(g.update_ratio)]
    return max(found, key=lambda x: x[1].update_ratio or 0.0, default=None)


def _largest_ratio(readings: list[Reading]) -> float | None:
    worst = _worst(readings)
    return worst[1].update_ratio if worst else None


def _ramped(readings: list[Reading]) -> bool:
    """Whether the rate of the first step was under half of the highest so far."""
    first = max((g.lr for g in readings[0].groups), default=0.0)
    highest = max(g.lr for r in readings for g in r.groups)
    return first < highest / 2


def _start(h: History) -> float:
    return h.losses[0][1]


def _recent(h: History) -> float:
    return fmean(loss for _, loss in h.losses[-10:])


def _rising(h: History) -> bool:
    return len(h.losses) >= FIRST_STEPS and _recent(h) > JUMP * _start(h)


def _grown(h: History, until: int) -> bool:
    """Whether the losses before a step had risen above where they began."""
    before = [loss for step, loss in h.losses if step < until and isfinite(loss)]
    return len(before) > FIRST_STEPS and fmean(before[-3:]) > JUMP * before[0]
