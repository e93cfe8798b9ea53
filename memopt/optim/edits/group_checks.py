"""Parameters as torch.optim takes them, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from memopt.core.hyperparameters import SpecError, check_max_grad_norm
from memopt.core.param_names import clean_names
from memopt.layout.steppable import check_steppable
from memopt.rules import RULES
from memopt.spec import OptimSpec

#: Keys of a group that torch.optim itself keeps there.
TORCH_KEYS = ("params", "param_names")
#: Those of its keys that say how it computes, not what.
TORCH_EXECUTION = ("foreach", "fused", "capturable", "differentiable")


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
    return _cleaned(groups)


def _cleaned(groups: list[Any]) -> list[Any]:
    """Without what wrappers put into names: those of all groups together, for they are of one model."""
    if isinstance(groups[0], Mapping):
        lists = [_listed(group.get("params")) if isinstance(group, Mapping) else [] for group in groups]
        names = iter(clean_names(p[0] for params in lists for p in params if _is_named(p)))
        return [
            {**group, "params": [(next(names), p[1]) if _is_named(p) else p for p in params]} if params else group
            for group, params in zip(groups, lists, strict=True)
        ]
    names = iter(clean_names(p[0] for p in groups if _is_named(p)))
    return [(next(names), p[1]) if _is_named(p) else p for p in groups]


def _listed(params: Any) -> list[Any]:
    return [] if params is None or isinstance(params, (Tensor, set)) else list(params)


def _is_named(p: Any) -> bool:
    return isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str)


def check_group(group: Any, spec: OptimSpec, seen: set[int], live: bool = False) -> dict[str, Any]:
    """A copy of a param group with every hyperparameter of the rule filled in and checked; of a ``live`` one only the
    parameters are looked at."""
    if not isinstance(group, dict) or "params" not in group:
        raise SpecError(f"a param group is a dict with 'params'; got {type(group).__name__}")
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else params
    if isinstance(params, set):
        raise SpecError("parameters must be ordered; a set is not")
    params = list(params)
    name = spec.rule_of(group)
    if live:
        for p in params:
            _check_parameter(p, "a parameter", seen)
        return group
    if "rule" in group and name not in spec.rule_names:
        raise SpecError(f"a param group is of the rule {name!r}; '{spec}' has {', '.join(spec.rule_names)}")
    rule = RULES[name]
    hyperparameters = rule.hyperparameters
    given = {k: v for k, v in group.items() if k in hyperparameters}
    for key in group:
        if key not in hyperparameters and key not in (*TORCH_KEYS, "max_grad_norm"):
            _refuse_typo(key, {**hyperparameters, "max_grad_norm": None}, name)
    h = spec.resolve(given, rule=name)
    check_max_grad_norm(group.get("max_grad_norm"), spec.engine)
    for p in params:
        tensor = p[1] if isinstance(p, tuple) else p
        _check_parameter(tensor, p[0] if isinstance(p, tuple) else "a parameter", seen)
    return {**group, **h, **({"rule": name} if spec.is_mixed else {}), "params": params}


def is_named(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether parameters have names and not only numbers."""
    groups = [group for group in groups if group["params"]]
    return bool(groups) and all(group.get("param_names") for group in groups)


def align_names(group: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """torch.optim takes groups with names or groups without; an empty one is of either kind."""
    named = any(isinstance(p, tuple) for p in group["params"]) or "param_names" in group
    if not group["params"] and any("param_names" in other for other in groups):
        group["param_names"] = []
    for other in groups:
        if named and not other["params"]:
            other.setdefault("param_names", [])


def _check_parameter(p: Any, name: str, seen: set[int]) -> None:
    if not isinstance(p, Tensor):
        raise SpecError(f"{name} is a {type(p).__name__}; an optimizer takes tensors")
    if not p.is_leaf and not p.retains_grad:
        raise SpecError(f"{name} of shape {tuple(p.shape)} is not a leaf tensor; an optimizer takes leaves")
    if p.requires_grad:  # what is frozen may be anything: it is not stepped
        check_steppable(name, p)
    if id(p) in seen:
        raise SpecError(f"{name} of shape {tuple(p.shape)} appears more than once")
    seen.add(id(p))


def _refuse_typo(key: str, allowed: Mapping[str, Any], rule: str) -> None:
    """A key that is nearly a hyperparameter is a mistake; any other is the caller's or a scheduler's note."""
    from difflib import get_close_matches

    near = get_close_matches(key, allowed, n=1, cutoff=0.8)
    if near:
        raise SpecError(f"{rule} has no hyperparameter {key!r}; did you mean {near[0]!r}?")
