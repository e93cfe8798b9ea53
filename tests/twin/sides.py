"""The two sides of a pair: a bag of parameters and its optimizer, memopt's or the twin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import memopt
from memopt.kernels import loader
from tests.twin.cases import TORCH, Case
from tests.twin.mixed import Together


class Bag(nn.Module):
    """Parameters by name. The loss is linear in them, so that a gradient is what the twin has, too, whatever the
    weights have become."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, x in tensors.items():
            self.register_parameter(name, nn.Parameter(x))

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        parts = [
            (p * gradients[name].to(p.dtype)).sum().float()
            for name, p in self.named_parameters()
            if name in gradients and p.requires_grad
        ]
        return torch.stack(parts).sum() if parts else torch.zeros((), requires_grad=True)


class Side:
    def __init__(self, model: Bag, opt: Any, ours: bool) -> None:
        self.model, self.opt, self.ours = model, opt, ours
        self.scheduler: Any = None
        self.counts = {"pre": 0, "post": 0}

    def of(self, name: str) -> nn.Parameter:
        return getattr(self.model, name)

    def name_of(self, p: Tensor) -> str:
        return next(name for name, q in self.model.named_parameters() if q is p)

    def names(self) -> list[list[str]]:
        """By group, the names of what the optimizer has."""
        return [[self.name_of(p) for p in group["params"]] for group in self.opt.param_groups]

    def group_of(self, name: str) -> dict[str, Any]:
        p = self.of(name)
        return next(group for group in self.opt.param_groups if any(q is p for q in group["params"]))

    def state_of(self, name: str) -> dict[str, Any]:
        return self.opt.state[self.of(name)]

    def gradients(self, given: Mapping[str, Tensor]) -> None:
        """Put them there by hand."""
        for name, g in given.items():
            p = self.of(name)
            if p.requires_grad:
                p.grad = g.to(p.dtype).clone()

    def backward(self, given: Mapping[str, Tensor], scale: float = 1.0) -> None:
        (self.model(given) * scale).backward()

    def step(self, closure: Any = None) -> Any:
        if not isinstance(self.opt, memopt.Optimizer):
            self._begin_switched()
        return self.opt.step(closure) if closure else self.opt.step()

    def _begin_switched(self) -> None:
        """torch.optim has no state for what is switched on later, but SGD's buffer: ours begins at zero."""
        for group in self.opt.param_groups:
            for p in group["params"]:
                state = self.opt.state.get(p)
                for key, moment in SWITCHED.items():
                    if state and group.get(key) and not isinstance(self.opt, torch.optim.SGD):
                        state.setdefault(moment, torch.zeros_like(p))


#: Hyperparameters that may be switched on in mid-training, and the moment that they keep.
SWITCHED = {"momentum": "momentum_buffer", "amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}


@contextmanager
def kernels_off() -> Iterator[None]:
    """The plain torch path, which is the definition."""
    before, loader._loaded = loader._loaded, loader.Missing("a twin is stepped by the plain path")
    try:
        yield
    finally:
        loader._loaded = before


def twin_optimizer(case: Case, groups: list[dict[str, Any]]) -> Any:
    """torch.optim's of the same rule; for a rule or a form that torch does not have, the plain path in 32 bits."""
    spec = memopt.parse(case.spec)
    if spec.is_mixed:
        return Together(groups)
    cls, extra = TORCH.get(spec.rule, (None, ()))
    factored = spec.format == "factored"
    if spec.rule == "adafactor" and not factored:
        cls = None
    if cls is not None:
        more = {} if spec.rule == "adafactor" else {"foreach": False}
        return cls([{k: v for k, v in group.items() if k not in extra} for group in groups], **more)
    return memopt.create(groups, f"{spec.rule}-{'factored' if factored else '32bit'}", nonfinite="propagate")


def set_data(p: nn.Parameter, x: Tensor) -> None:
    """The same weight in other memory; its gradient has the old size and goes."""
    p.grad = None
    p.data = x.to(p.dtype).contiguous()
