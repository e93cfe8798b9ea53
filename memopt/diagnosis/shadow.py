"""32-bit shadows of a few rows of a few parameters: the same rule on the same gradients, never rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt.diagnosis.readings import MomentReading
from memopt.rules.base import Rule

#: Elements of one sample.
NUMEL = 512


class Sample(NamedTuple):
    """Some elements of one parameter: ``cut`` takes them out of a tensor of its shape; ``moments()`` decodes the same
    elements of what is stored: name -> (values, format, never negative)."""

    name: str
    p: Tensor
    cut: Callable[[Tensor], Tensor]
    moments: Callable[[], dict[str, tuple[Tensor, str, bool]]]


class Flat:
    """The :class:`memopt.rules.base.State` of the shadow: plain fp32 tensors, flat, over all samples of a group."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def write(self, name: str, value: Tensor, floor: float = 0.0) -> Tensor:
        if value is not self.tensors[name]:
            self.tensors[name].copy_(value)
        return value

    def rms(self, x: Tensor) -> Tensor:
        raise NotImplementedError("a sample has no statistics of the whole tensor")


class Shadow:
    """Samples of one param group, stepped together. Begins with what is stored at its first step."""

    def __init__(self, rule: Rule, group: Mapping[str, Any], samples: list[Sample], step: int) -> None:
        self.rule, self.group, self.samples = rule, group, samples
        self.step = step
        stored = [sample.moments() for sample in samples]
        names = stored[0]
        self.state = Flat({m: torch.cat([s[m][0] for s in stored]).float() for m in names})
        self.sizes = [len(next(iter(s.values()))[0]) for s in stored]

    def gather(self) -> tuple[Tensor, Tensor] | None:
        """(weights, gradients) of all samples before a step, flat fp32, where their state is; None where a gradient is
        missing."""
        grads = [s.p.grad for s in self.samples]
        if any(g is None for g in grads):
            return None
        device = next(iter(self.state.tensors.values())).device
        p = torch.cat([s.cut(s.p.detach()) for s in self.samples]).to(device).float()
        g = torch.cat([s.cut(g) for s, g in zip(self.samples, grads, strict=True) if g is not None]).to(device).float()
        return p, -g if self.group.get("maximize") else g

    def advance(self, p: Tensor, g: Tensor) -> None:
        """One step of the rule. ``p`` is changed to what an exact step would have made of it."""
        self.step += 1
        self.rule.update(p, g, self.state, self.step, self.group)

    def compare(self) -> list[MomentReading]:
        readings = []
        exact = {m: t.split(self.sizes) for m, t in self.state.tensors.items()}
        for i, sample in enumerate(self.samples):
            for moment, (values, fmt, positive) in sample.moments().items():
                truth = exact[moment][i].double()
                size = float(truth.norm())
                error = float((values.double() - truth).norm()) / size if size else 0.0
                ratio = _typical_ratio(values.double(), truth) if positive else None
                readings.append(MomentReading(sample.name, moment, fmt, error, ratio))
        return readings


def _typical_ratio(stored: Tensor, truth: Tensor) -> float | None:
    """The geometric mean of stored / truth: a sum would see the largest elements alone, which follow."""
    seen = truth > 0
    ratios = (stored[seen] / truth[seen]).clamp_(1e-3, 1e3)
    return float(ratios.log().mean().exp()) if len(ratios) else None
