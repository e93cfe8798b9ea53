"""Param groups of one rule each, where a spec has several: what is given as one group is split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from memopt.core.hyperparameters import SpecError
from memopt.core.param_kinds import kind_of, looks_like_vocabulary, some
from memopt.core.user_warning import warn
from memopt.rules import RULES
from memopt.rules.matrices import blocks, matrices
from memopt.spec.overrides import rule_and_format

if TYPE_CHECKING:
    from memopt.spec import OptimSpec


def split(group: Mapping[str, Any], spec: OptimSpec, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """A param group as one for each rule of its parameters, in the order of the spec's rules; itself where it says its
    rule already, or the spec has one. Raises SpecError for a value that means one thing to each of two rules."""
    if not spec.is_mixed or "rule" in group or "params" not in group:
        return [dict(group)]
    params = group["params"]
    if isinstance(params, Tensor):
        params = [params]
    names, bare = group.get("param_names"), isinstance(params, set)
    found: dict[str, list[int]] = {}
    params = list(params)
    for i, p in enumerate(params):
        name, tensor = p if isinstance(p, tuple) and len(p) == 2 else (names[i] if names else str(i), p)
        if bare or not isinstance(tensor, Tensor):
            return [{**group, "rule": spec.rule}]  # for the check that follows to refuse
        if is_lazy(tensor):
            raise SpecError(
                f"parameter {name} is of a lazy module and has no shape yet, by which '{spec}' chooses its rule: run "
                "the model once before, or give a param group with 'rule'"
            )
        shape = tuple(tensor.shape)
        rule = spec.rule_for(name, shape, kinds.get(name, "")) if p is not tensor or names else None
        rule = rule or spec.rule_for("", shape)
        found.setdefault(rule, []).append(i)
    if len(found) > 1 and "lr" in group:
        clash = [rule for rule in found if "lr" in spec.rules.get(rule, {})]
        if clash:
            raise SpecError(
                f"a param group gives lr={group['lr']!r} to parameters of {' and of '.join(found)}, and "
                f"rules={{{clash[0]!r}: ...}} gives {clash[0]} a rate of its own; give groups of one rule a rate"
            )
    groups = []
    for rule in [r for r in spec.rule_names if r in found] or [spec.rule]:
        mine = found.get(rule, [])
        one = {k: v for k, v in group.items() if k in _own_keys(rule, group, spec, len(found))}
        one |= {"params": [params[i] for i in mine], "rule": rule}
        if names:
            one["param_names"] = [names[i] for i in mine]
        groups.append(one)
    return groups


def _own_keys(rule: str, group: Mapping[str, Any], spec: OptimSpec, several: int) -> list[str]:
    """What of a group is for its parameters of this rule: hyperparameters of another rule alone are not."""
    others = {key for name in spec.rule_names for key in RULES[name].hyperparameters}
    own = RULES[rule].hyperparameters
    return [key for key in group if key in own or key not in others or several < 2]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """() of a lazy module's parameter."""
    return () if is_lazy(tensor) else tuple(tensor.shape)


def by_rule(entries: Iterable[tuple[str, Tensor]], spec: OptimSpec, kinds: Mapping[str, str]) -> Iterator[Any]:
    """What :func:`memopt.create` makes of a model's named parameters: themselves, or groups of one rule each."""
    entries = list(entries)
    if not spec.is_mixed or not entries:
        return iter(entries)
    return iter(split({"params": entries}, spec, kinds))


def check_blocks(group: Mapping[str, Any]) -> None:
    """Raise SpecError where a matrix of this group does not split as it says."""
    split_rows = group.get("split_rows")
    for i, one in enumerate(group["params"] if split_rows is not None else ()):
        name, p = one if isinstance(one, tuple) else (f"parameter {i} of its group", one)
        shape = _shape(p)
        try:
            blocks(matrices(shape).rows if len(shape) > 1 else 1, split_rows)
        except SpecError as error:
            raise SpecError(f"{name}: {error}") from None


def check_assigned(
    entries: Sequence[tuple[str, Tensor, Mapping[str, Any]]], spec: OptimSpec, kinds: Mapping[str, str], named: bool
) -> None:
    """Raise SpecError where a rule of matrices has got none, or what is none; warn of what it has got and may not be a
    hidden matrix."""
    strict = {name for name in spec.rule_names if RULES[name].declines is not None}
    for rule in strict & {spec.rule}:
        if not any(spec.rule_of(group) == rule for _, _, group in entries):
            shown = some(f"{name} {tuple(_shape(p))}" for name, p, _ in entries)
            other = spec.replace(
                rule=rule_and_format(spec.fallback, "")[0], fallback="", hyper={}, rules={}, overrides={}, options={}
            )
            raise SpecError(f"'{spec}': no parameter is a hidden matrix, for {rule} to step ({shown}); use '{other}'")
    doubted = []
    for name, p, group in entries:
        rule = spec.rule_of(group)
        if rule not in strict:
            continue
        shape = _shape(p)
        if len(shape) < 2 and shape != ():
            raise SpecError(f"{name} of shape {shape} is a vector, and {rule} steps matrices; give it another rule")
        kind = kind_of(name, kinds) if named else kinds.get(name, "")
        if RULES[rule].part_of:
            continue  # it is made for that kind
        if kind:
            doubted.append(f"{name} is {kind}")
        elif looks_like_vocabulary(shape):
            doubted.append(f"{name} of shape {shape} may be an embedding or a head")
    if doubted:
        warn(
            f"{spec.rule} will step {some(doubted)}: it is made for hidden matrices, and these train worse "
            f"with it. An override gives them another rule, as overrides={{'name': 'adamw'}}"
        )
    unnamed = [name for name, _, group in entries if spec.rule_of(group) in strict]
    if unnamed and not named:
        warn(
            f"the {len(unnamed)} matrices that {spec.rule} will step have no names, by which embeddings, heads and "
            "gates would be left to the fallback: pass the model, or (name, parameter) pairs"
        )
