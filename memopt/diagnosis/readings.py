"""What is measured, as plain records: numbers, and None where there is nothing to measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

#: A step moves weights by 1e-4 to 1e-2 of their size; more is usual only while small first weights are outgrown.
LARGE_STEP = 0.02
#: A group whose rate and whose steps are this many times the others' was not meant to be.
OUTLIER = 10.0
#: Groups that are printed one by one; of more, ranges.
SHOWN = 3


@dataclass(frozen=True)
class GroupReading:
    """One param group in one step.

    ``update_ratio`` is |change of the weights| / |weights| of the median parameter, ``lost`` the share of elements with
    a gradient that the step left as they were because the change was rounded away (None with a master, which keeps
    it); of a sample of each parameter.
    """

    group: int
    names: str
    lr: float
    grad_norm: float  # as the optimizer saw it: after clipping
    nonfinite: int  # elements of the gradients
    update_ratio: float | None
    lost: float | None
    dtype: str
    estimate: float | None = None  # what the rule has found lr is multiplied by (prodigy's d)


@dataclass(frozen=True)
class MomentReading:
    """A sampled row of one moment against its 32-bit shadow: |stored - shadow| / |shadow|, and for non-negative moments
    the geometric mean of stored / shadow over its elements."""

    parameter: str
    moment: str
    format: str
    error: float
    ratio: float | None


@dataclass(frozen=True)
class Reading:
    """All that was measured in one step; ``loss`` is the mean since the last reading."""

    step: int
    groups: tuple[GroupReading, ...]
    moments: tuple[MomentReading, ...]
    loss: float | None
    skipped: int  # steps skipped so far for NaN or Inf

    def to_json(self) -> dict[str, Any]:
        """Numbers that are not finite are null: JSON has no word for them."""
        return dict(_clean({"schema": "memopt.watch/1", **asdict(self)}))

    def __str__(self) -> str:
        parts = [f"step {self.step}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        parts += [_line(g) for g in self.groups] if len(self.groups) <= SHOWN else [_together(self.groups)]
        worst = max(self.moments, key=lambda m: m.error, default=None)
        if worst is not None and worst.error > 0:
            parts.append(f"worst moment {worst.parameter}.{worst.moment} off by {worst.error:.1%}")
        if self.skipped:
            parts.append(f"{self.skipped} steps skipped")
        return "  ".join(parts)


def _line(g: GroupReading) -> str:
    lost = f" lost {g.lost:.0%}" if g.lost is not None and g.lost >= 0.005 else ""
    ratio = f" update/weight {g.update_ratio:.1e}" if g.update_ratio is not None else ""
    d = f" d {g.estimate:.3g}" if g.estimate is not None else ""
    return f"[{g.group}] lr {g.lr:.3g}{d} |g| {g.grad_norm:.3g}{ratio}{lost}"


def _together(groups: tuple[GroupReading, ...]) -> str:
    """Many groups in a line: the range of each number, and the norm of all gradients."""
    rates = [g.lr for g in groups]
    ratios = [g.update_ratio for g in groups if g.update_ratio is not None]
    lost = max((g.lost for g in groups if g.lost is not None), default=0.0)
    norm = sum(g.grad_norm**2 for g in groups) ** 0.5
    text = f"{len(groups)} groups lr {min(rates):.3g} … {max(rates):.3g} |g| {norm:.3g}"
    found = sorted({g.estimate for g in groups if g.estimate is not None})
    text += f" d {found[0]:.3g}" if found else ""
    text += f" update/weight {min(ratios):.1e} … {max(ratios):.1e}" if ratios else ""
    return text + (f" lost up to {lost:.0%}" if lost >= 0.005 else "")


@dataclass(frozen=True)
class NonFinite:
    """NaN or Inf: the step in which it was first seen, where, and whether the weights were still numbers."""

    step: int
    names: tuple[str, ...]
    loss: float | None
    skipped: bool
    weights_finite: bool


@dataclass(frozen=True)
class Finding:
    """A cause by name, the sentence a person would say, and the step at which it showed."""

    cause: str
    sentence: str
    step: int


@dataclass
class History:
    """What the causes are found in."""

    readings: list[Reading] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)  # every step's, thinned to LOSSES at most
    nonfinite: list[NonFinite] = field(default_factory=list)
    master: str = "none"
    beta2: float | None = None
    muon: dict[int, str] = field(default_factory=dict)  # groups that Muon steps -> adjust_lr_fn


def _clean(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    return [_clean(v) for v in value] if isinstance(value, (list, tuple)) else value
