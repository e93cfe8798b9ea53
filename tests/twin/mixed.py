"""Cases of several rules: Muon on matrices, others by shape and by name, and their twin of torch.optim's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import memopt
from memopt.rules import RULES
from memopt.rules.matrices import matrices

if TYPE_CHECKING:
    from tests.twin.machine import Twin

#: Specs and hyperparameters to draw from. Products in torch's order: else a step differs by their rounding.
SPECS = ["muon{}(adamw)", "muon{}(adamw)", "muon{}(sgd)", "muon{}(adam-8bit)", "muon{}(rmsprop-32bit)"]
MUON: list[dict[str, Any]] = [{}, {"nesterov": False}, {"momentum": 0.8}, {"adjust_lr_fn": "original"}]
OTHERS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{}, {"amsgrad": True}, {"betas": (0.8, 0.95)}],
    "sgd": [{"momentum": 0.9}],
    "adam": [{}, {"eps": 1e-6}],
    "rmsprop": [{}, {"alpha": 0.9}],
}


def draw_spec(seed: int) -> str:
    """A spec of several rules for one sequence of eight, and for thousands that follow those of benchmarks/twin.py
    before there were such; "" for the others."""
    if not hasattr(torch.optim, "Muon"):  # before torch 2.9 there is no twin
        return ""
    r = Random(f"several rules {seed}")
    if r.random() >= 1 / 8 and seed not in range(20_000, 24_000):
        return ""
    fmt = r.choice(["", "", "", "-bf16", "-8bit", "-8bit", "-4bit"])
    master = r.choice(["", "", "+fp32", "+split16", "+kahan"])
    placement = r.choice(["", "", "@host", "@cpu", "@disk", "@paged"])
    return f"{r.choice(SPECS).format(fmt)}{master}{placement}{r.choice(['', '', '/zero1'])}"


def draw_hyper(r: Random) -> dict[str, Any]:
    return {"ns_dtype": "bfloat16", **r.choice(MUON)}


def draw_overrides(r: Random, spec: Any) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Overrides, and the hyperparameters of all rules but the spec's."""
    overrides = r.choice([{}, {}, {"w0": "sgd-32bit"}, {"w1": "adam"}, {"w0": "@host"}])
    others = {
        memopt.parse(spec.fallback).rule,
        *(text.partition("-")[0] for text in overrides.values() if text[0] != "@"),
    }
    return overrides, {rule: dict(r.choice(OTHERS[rule])) for rule in sorted(others)}


def overridden(spec: Any, overrides: dict[str, str], rules: dict[str, dict[str, Any]]) -> Any:
    """The spec with these overrides, and with what is said of rules that it has then."""
    spec = spec.replace(overrides=overrides, rules={})
    return spec.replace(rules={rule: h for rule, h in rules.items() if rule in spec.rule_names})


def given(spec: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of one of our groups, as another one is given them."""
    known = {*RULES[spec.rule_of(group)].hyperparameters, *(["rule"] if spec.is_mixed else [])}
    return {key: copy.deepcopy(value) for key, value in group.items() if key in known}


def rule_of(t: Twin, name: str) -> str:
    """The rule that a parameter of this name and shape has."""
    return str(t.ours.opt.spec.rule_for(name if t.case.named else "", tuple(t.ours.of(name).shape)))


def creatable(t: Twin) -> bool:
    """Whether an optimizer of this spec takes the parameters of now: a rule of matrices needs one."""
    spec = t.ours.opt.spec
    if not spec.is_mixed:
        return True
    groups = t.ours.opt.param_groups  # which say their rules, whatever shapes have become
    return set(spec.overrides) <= set(t.names) and any(g["params"] and spec.rule_of(g) == spec.rule for g in groups)


class Together(torch.optim.Optimizer):
    """One list of groups and one state: ``torch.optim.Muon``'s steps of the groups of that rule, of each matrix that a
    tensor is made of, and the steps of torch.optim's own optimizers of other groups."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["rule"] == "muon":
                self._step_muon(group)
            else:
                self._step_other(group)
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        keys = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")
        for p in group["params"]:
            if p.grad is None:
                continue
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            parts = [_matrices(x) for x in (p, -p.grad if group["maximize"] else p.grad, buffer)]
            torch.optim._muon.muon(*parts, has_complex=False, **{key: group[key] for key in keys})

    def _step_other(self, group: dict[str, Any]) -> None:
        from tests.twin.cases import TORCH

        cls, extra = TORCH[group["rule"]]
        if group["params"]:
            one = cls([{k: v for k, v in group.items() if k not in (*extra, "rule")}], foreach=False)
            one.state = self.state
            one.step()


def _matrices(x: Tensor) -> list[Tensor]:
    """Views of the matrices that a rule of matrices makes of a parameter."""
    x = x.detach()
    one = matrices(tuple(x.shape))
    return list(x) if one.stacked else [x.view(one.rows, one.cols)]
