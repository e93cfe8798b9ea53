"""Learning-rate schedules that people use, as one factor of the peak rate on torch's own ``LambdaLR``."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, isfinite, pi, sqrt
from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import SpecError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

#: kind -> (what it does after warm-up, the extra keywords it takes with their defaults)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "constant": ("stays at the peak", {}),
    "linear": ("falls in a line to the floor", {}),
    "cosine": ("falls in half a cosine to the floor", {}),
    "cosine_restarts": (
        "falls in cosines, each cycle_mult times longer than the last",
        {"cycle": None, "cycle_mult": 1},
    ),
    "inverse_sqrt": ("falls as 1 / sqrt(step), after `hold` steps at the peak", {"timescale": None, "hold": None}),
    "step": ("is multiplied by gamma every `every` steps", {"every": None, "gamma": 0.1}),
    "wsd": ("stays at the peak, then falls in a line over the last `decay` of all steps", {"decay": 0.1}),
}
NEEDS_TOTAL = ("linear", "cosine", "wsd")


class Factor:
    """The factor at a step, as a picklable object whose numbers ``LambdaLR.state_dict`` saves.

    With w warm-up steps and T steps in all, and x = (t - w) / (T - w) clamped to [0, 1]::

        t < w            (t + 1) / (w + 1)
        constant         1
        linear           f + (1 - f) (1 - x)
        cosine           f + (1 - f) (1 + cos(pi x)) / 2
        cosine_restarts  as cosine, x the share of the current cycle that has passed (SGDR)
        inverse_sqrt     max(f, sqrt(s / (s + t - w))), s the timescale, by default max(w, 1);
                         with hold h: max(f, sqrt(h / max(t - w + 1, h))), 1 / sqrt(step) of T5 and PaLM
        step             max(f, gamma^floor((t - w) / every))
        wsd              1, then linear to f over the last decay * T steps
    """

    def __init__(self, kind: str, warmup: int, total_steps: int | None, floor: float, extra: dict[str, Any]) -> None:
        self.kind = kind
        self.warmup = warmup
        self.total_steps = total_steps
        self.floor = floor
        self.extra = extra

    def __call__(self, t: int) -> float:
        if t < self.warmup:
            return (t + 1) / (self.warmup + 1)
        return _SHAPES[self.kind](self, t - self.warmup)

    def between(self, share: float) -> float:
        """The floor at share 0, the peak at share 1."""
        return self.floor + (1 - self.floor) * share

    def passed(self, t: int) -> float:
        assert self.total_steps is not None
        return min(t / max(self.total_steps - self.warmup, 1), 1.0)


def _restarts(f: Factor, t: int) -> float:
    cycle, mult = f.extra["cycle"], f.extra["cycle_mult"]
    if mult == 1:
        t %= cycle
    while t >= cycle:
        t -= cycle
        cycle *= mult
    return f.between((1 + cos(pi * t / cycle)) / 2)


def _inverse_sqrt(f: Factor, t: int) -> float:
    hold = f.extra["hold"]
    if hold is not None:
        return max(f.floor, sqrt(hold / max(t + 1, hold)))
    scale = f.extra["timescale"] or max(f.warmup, 1)
    return max(f.floor, sqrt(scale / (scale + t)))


def _wsd(f: Factor, t: int) -> float:
    assert f.total_steps is not None
    length = f.extra["decay"] * f.total_steps
    left = f.total_steps - f.warmup - t
    return 1.0 if left >= length else f.between(max(left, 0) / length)


_SHAPES: dict[str, Callable[[Factor, int], float]] = {
    "constant": lambda f, t: 1.0,
    "linear": lambda f, t: f.between(1 - f.passed(t)),
    "cosine": lambda f, t: f.between((1 + cos(pi * f.passed(t))) / 2),
    "cosine_restarts": _restarts,
    "inverse_sqrt": _inverse_sqrt,
    "step": lambda f, t: max(f.floor, f.extra["gamma"] ** (t // f.extra["every"])),
    "wsd": _wsd,
}


def schedule(
    optimizer: Optimizer,
    kind: str,
    *,
    warmup: int | float = 0,
    total_steps: int | None = None,
    floor: float = 0.0,
    decay_with_rate: bool = False,
    **extra: Any,
) -> LambdaLR:
    """A torch scheduler that multiplies every group's rate by a factor; call its ``step()`` after the optimizer's.

    Save and load it as any torch scheduler. :class:`Factor` has the equations.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; the groups' present rates are the peaks.
        kind: ``"constant"``, ``"linear"``, ``"cosine"``, ``"cosine_restarts"``, ``"inverse_sqrt"``, ``"step"`` or
            ``"wsd"`` (warm-up, stable, decay).
        warmup: Steps over which the rate rises in a line, an integer; or their share of ``total_steps``, a float in
            [0, 1). The first step already has a rate above zero.
        total_steps: Steps of the whole run, warm-up included; needed by linear, cosine and wsd.
        floor: The lowest factor, a share of the peak in [0, 1].
        decay_with_rate: Multiply every group's weight decay by the same factor (PaLM's dynamic decay, and AdamC's of
            Defazio 2025: decoupled, it then goes with the square of the rate over its peak).
        extra: Of the kind. cosine_restarts: ``cycle`` (steps of the first cycle) and ``cycle_mult`` (1);
            inverse_sqrt: ``timescale`` (steps; the warm-up's) or ``hold`` (steps at the peak); step: ``every`` (steps)
            and ``gamma`` (0.1); wsd: ``decay`` (share of all steps, 0.1).

    Returns:
        A ``torch.optim.lr_scheduler.LambdaLR``.

    Raises:
        SpecError: for an unknown kind or keyword, a value that is not allowed, and a group with ``lr=None``.

    >>> import torch, memopt
    >>> opt = memopt.create(torch.nn.Linear(2, 2), "adamw", lr=1e-3)
    >>> rates = memopt.schedule(opt, "cosine", warmup=2, total_steps=10, floor=0.1)
    >>> opt.param_groups[0]["lr"] == 1e-3 / 3
    True
    """
    factor = make_factor(kind, warmup=warmup, total_steps=total_steps, floor=floor, **extra)
    if any(group["lr"] is None for group in optimizer.param_groups):
        raise SpecError("schedule: a group has lr=None, so its rule makes its own rate; give it an lr")
    from memopt.training.lr_scheduler import FactorLR

    return FactorLR(optimizer, factor, decay_with_rate)


def make_factor(
    kind: str, *, warmup: int | float = 0, total_steps: int | None = None, floor: float = 0.0, **extra: Any
) -> Factor:
    """The factor alone, a function of the step. Raises SpecError for values that are not allowed."""
    if kind not in KINDS:
        raise SpecError(f"unknown schedule {kind!r}; allowed: {', '.join(KINDS)}")
    defaults = KINDS[kind][1]
    unknown = [name for name in extra if name not in defaults]
    if unknown:
        raise SpecError(
            f"the schedule {kind!r} has no {unknown[0]!r}; it has {', '.join(defaults) or 'no extra keywords'}"
        )
    if total_steps is not None and not _whole(total_steps, 1):
        raise SpecError(f"total_steps={total_steps!r} is not allowed; it must be an integer >= 1")
    if total_steps is None and (kind in NEEDS_TOTAL or (isinstance(warmup, float) and 0 < warmup < 1)):
        raise SpecError(f"the schedule {kind!r} with warmup={warmup!r} needs total_steps")
    if not (_whole(warmup, 0) or (isinstance(warmup, float) and 0 <= warmup < 1)):
        raise SpecError(f"warmup={warmup!r} is not allowed; it must be an integer >= 0 or a share in [0, 1)")
    steps = round(warmup * total_steps) if isinstance(warmup, float) and total_steps else int(warmup)
    if total_steps is not None and steps > total_steps:
        raise SpecError(f"warmup={warmup!r} is longer than total_steps={total_steps}")
    if not _number(floor) or not 0 <= floor <= 1:
        raise SpecError(f"floor={floor!r} is not allowed; it is a share of the peak rate, in [0, 1]")
    values = {**defaults, **extra}
    for name, value in values.items():
        _check_extra(kind, name, value)
    if values.get("hold") and values.get("timescale"):
        raise SpecError("the schedule 'inverse_sqrt' has 'hold' and 'timescale'; give one of them")
    return Factor(kind, steps, total_steps, float(floor), values)


def _check_extra(kind: str, name: str, value: Any) -> None:
    allowed, ok = {
        "cycle": ("an integer >= 1", _whole(value, 1)),
        "cycle_mult": ("an integer >= 1", _whole(value, 1)),
        "hold": ("None or an integer >= 1", value is None or _whole(value, 1)),
        "timescale": ("None or an integer >= 1", value is None or _whole(value, 1)),
        "every": ("an integer >= 1", _whole(value, 1)),
        "gamma": ("a number in (0, 1]", _number(value) and 0 < value <= 1),
        "decay": ("a share in (0, 1]", _number(value) and 0 < value <= 1),
    }[name]
    if not ok:
        raise SpecError(f"the schedule {kind!r}: {name}={value!r} is not allowed; it must be {allowed}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
