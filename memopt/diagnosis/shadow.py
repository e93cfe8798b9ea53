"""32-bit shadows of a few rows of a few parameters: the same rule on the same gradients, never rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt.core.rows import Shape
from memopt.diagnosis.readings import MomentReading
from memopt.rules.base import Rule

#: Elements of one sample.
NUMEL = 512


class Sample(NamedTuple):
    """Some elements of one parameter: ``cut`` takes them out of a tensor of its shape; ``moments()`` decodes the same
    elements of what is stored: name -> (values, format, never negative). ``mark()`` is another where somebody other
    than a step has written to what is stored, or put something else in its place."""

    name: str
    p: Tensor
    cut: Callable[[Tensor], Tensor]
    moments: Callable[[], dict[str, tuple[Tensor, str, bool]]]
    mark: Callable[[], object]


class ShadowState:
    """The :class:`memopt.rules.base.State` of the shadow: plain fp32 tensors, flat, over all samples of a group."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        if name not in self.tensors:  # a hyperparameter that was switched on: it begins at zero
            self.tensors[name] = torch.zeros_like(next(iter(self.tensors.values())))
        return self.tensors[name]

    def write(self, name: str, value: Tensor, floor: float = 0.0) -> Tensor:
        if value is not self.tensors[name]:
            self.tensors[name].copy_(value)
        return value

    @property
    def shape(self) -> Shape:
        raise NotImplementedError("a sample of elements has no shape")

    def orthogonal(self, x: Tensor) -> Tensor:
        raise NotImplementedError("a sample of elements is no matrix")

    def column_sums(self, x: Tensor) -> Tensor:
        raise NotImplementedError("a sample of elements has no columns")

    def left_product(self, columns: Callable[[int, int], Tensor], x: Tensor) -> Tensor:
        raise NotImplementedError("a sample of elements has no columns")

    @property
    def key(self) -> int:
        raise NotImplementedError("a sample of several parameters has no key of one")

    def report(self, numbers: Sequence[Tensor]) -> None:
        raise NotImplementedError("a sample has no sums over all parameters")

    def rank_one(self, name: str) -> bool:
        return False

    def rms(self, x: Tensor) -> Tensor:
        raise NotImplementedError("a sample has no statistics of the whole tensor")


class Shadow:
    """Samples of one param group, stepped together. Begins with what is stored at its first step. A sample whose
    parameter has no gradient in a step is not stepped in it."""

    def __init__(self, rule: Rule, group: Mapping[str, Any], samples: list[Sample], step: int) -> None:
        self.rule, self.group, self.samples = rule, group, samples
        self.step = step
        stored = [sample.moments() for sample in samples]
        names = [moment.name for moment in rule.moments(group, (2, 2))]
        self.state = ShadowState({m: torch.cat([s[m][0] for s in stored]).float() for m in names})
        self.shapes = [sample.p.shape for sample in samples]
        self.sizes = [len(next(iter(s.values()))[0]) for s in stored]
        self.marks: list[object] = []
        self.note()

    def note(self) -> None:
        """The step is over: what is stored now is what the next step is to find."""
        self.marks = [sample.mark() for sample in self.samples]

    @property
    def is_current(self) -> bool:
        """Whether what is stored is what the last step left; else the shadow is of a state that is gone."""
        return [sample.mark() for sample in self.samples] == self.marks

    def gather(self) -> tuple[Tensor, Tensor, list[int]] | None:
        """(weights, gradients) of all samples before a step, flat fp32, where their state is, and which samples have no
        gradient; None where none has, or one has another shape than before."""
        if [s.p.shape for s in self.samples] != self.shapes:
            return None
        # A gradient of another shape is not stepped either: the step says so.
        grads = [g if (g := s.p.grad) is not None and g.shape == s.p.shape else None for s in self.samples]
        idle = [i for i, g in enumerate(grads) if g is None]
        if len(idle) == len(grads):
            return None
        device = next(iter(self.state.tensors.values())).device
        p = torch.cat([s.cut(s.p.detach()) for s in self.samples]).to(device).float()
        g = torch.cat(
            [
                p.new_zeros(n) if g is None else s.cut(g).to(device).float()
                for s, g, n in zip(self.samples, grads, self.sizes, strict=True)
            ]
        )
        if len(p) != sum(self.sizes) or len(g) != len(p):
            return None
        return p, -g if self.group.get("maximize") else g, idle

    def advance(self, p: Tensor, g: Tensor, idle: list[int]) -> None:
        """One step of the rule. ``p`` is changed to what an exact step would make of it; samples in ``idle`` stay."""
        self.step += 1
        before = {name: [x.clone() for x in t.split(self.sizes)] for name, t in self.state.tensors.items() if idle}
        self.rule.update(p, g, self.state, self.step, self.group)
        for name, tensor in self.state.tensors.items() if idle else ():
            now, parts = tensor.split(self.sizes), before.get(name)
            for i in idle:
                now[i].zero_() if parts is None else now[i].copy_(parts[i])

    def compare(self) -> list[MomentReading]:
        readings = []
        for i, sample in enumerate(self.samples):
            for moment, (values, fmt, positive) in sample.moments().items():
                truth = self.state.read(moment).split(self.sizes)[i].double()
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
