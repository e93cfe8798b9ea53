"""Parameters as torch.optim takes them, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.hyper import SpecError
from memopt.rules import RULES
from memopt.spec import OptimSpec

#: Keys of a group that torch.optim itself keeps there.
TORCH_KEYS = ("params", "param_names")


def named_groups(params: Iterable[Any]) -> list[Any]:
    """What the caller gave, as a list; raises SpecError where torch.optim would fail obscurely."""
    if isinstance(params, Tensor):
        raise SpecError("parameters must be a model, an iterable of tensors or of param groups, not a single tensor")
    if isinstance(params, Mapping):
        raise SpecError(
            "parameters must be a model, an iterable of tensors or of param groups, not a dict; "
            "for one group write [{'params': …}]"
        )
    groups = list(params)
    if not groups:
        raise SpecError("the parameter list is empty; an optimizer needs at least one parameter")
    return groups


def check_group(group: Any, spec: OptimSpec, seen: set[int]) -> dict[str, Any]:
    """A copy of a param group with every hyperparameter of the rule filled in and checked."""
    if not isinstance(group, dict) or "params" not in group:
        raise SpecError(f"a param group is a dict with 'params'; got {type(group).__name__}")
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else params
    if isinstance(params, set):
        raise SpecError("parameters must be ordered; a set is not")
    params = list(params)
    if not params:
        raise SpecError("a param group is empty; it needs at least one parameter")
    rule = RULES[spec.rule]
    known = rule.hyperparameters
    given = {k: v for k, v in group.items() if k in known}
    for key in group:
        if key not in known and key not in TORCH_KEYS:
            _refuse_typo(key, known, spec.rule)
    spec.resolve(given)
    for p in params:
        tensor = p[1] if isinstance(p, tuple) else p
        _check_parameter(tensor, p[0] if isinstance(p, tuple) else "a parameter", seen)
    return {**group, **rule.resolve({**spec.hyper, **given}), "params": params}


def _check_parameter(p: Any, name: str, seen: set[int]) -> None:
    if not isinstance(p, Tensor):
        raise SpecError(f"{name} is a {type(p).__name__}; an optimizer takes tensors")
    if not p.is_leaf and not p.retains_grad:
        raise SpecError(f"{name} of shape {tuple(p.shape)} is not a leaf tensor; an optimizer takes leaves")
    if not p.is_floating_point():
        raise SpecError(f"{name} has dtype {p.dtype}; memopt takes float16, bfloat16, float32 and float64 parameters")
    if p.layout is not torch.strided:
        raise SpecError(f"{name} has layout {p.layout}; memopt takes dense parameters")
    if id(p) in seen:
        raise SpecError(f"{name} of shape {tuple(p.shape)} appears more than once")
    seen.add(id(p))


def _refuse_typo(key: str, known: Mapping[str, Any], rule: str) -> None:
    """A key that is nearly a hyperparameter is a mistake; any other is the caller's or a scheduler's note."""
    from difflib import get_close_matches

    near = get_close_matches(key, known, n=1, cutoff=0.8)
    if near:
        raise SpecError(f"{rule} has no hyperparameter {key!r}; did you mean {near[0]!r}?")
