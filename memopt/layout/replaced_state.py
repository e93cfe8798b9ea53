"""State that somebody else put into ``optimizer.state``: what can be taken over is brought into the layout.

People reset moments by hand, move them to another device and back, put them there in the dtype of a model in 16 bits or
in the plain layout of torch.optim, and switch on hyperparameters for which there is no state yet. A state meets this
file where it was found not to be as its layout and its placement have it, before anything is stepped or counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memopt.core import dither
from memopt.formats import Shard
from memopt.masters import MASTERS
from memopt.rules import RULES

if TYPE_CHECKING:
    from memopt.core.ledger import TensorSpec
    from memopt.layout.param import MomentLayout, ParamLayout

#: Keys of what masters keep.
MASTER_KEYS = frozenset(master.key for master in MASTERS.values() if master.key)


class Here(NamedTuple):
    """What is known of the parameter beside its layout: ``p`` are the rows here, ``local`` their shape, ``h`` are its
    group's hyperparameters, ``rows_of(x)`` the rows here of a tensor of the whole parameter's shape ``shape``,
    ``total`` adds up over the ranks that have the others."""

    p: Tensor
    local: tuple[int, ...]
    h: Mapping[str, Any]
    shape: torch.Size
    rows_of: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]


def is_plain(layout: ParamLayout, state: Mapping[str, Any]) -> bool:
    """Whether a moment that is kept in a code stands in the state as torch.optim keeps it."""
    return not layout.coded.isdisjoint(state)


def lost_master(layout: ParamLayout, state: Mapping[str, Any]) -> bool:
    """Whether something stands beside a weight that needs no master any more: it was cast to 32 bits."""
    if MASTER_KEYS.isdisjoint(state):
        return False
    return any(key in state and key not in layout.tensors for key in MASTER_KEYS)


def of_another_rule(rule: str, rules: tuple[str, ...], state: Mapping[str, Any]) -> set[str]:
    """The names of moments in a state that others of the spec's ``rules`` keep, and this one never: its parameter was
    moved from a group of theirs."""
    foreign = _foreign(rule, rules)
    return {name for key in state if (name := key.partition(".")[0]) in foreign} if foreign else set()


@lru_cache(maxsize=256)
def _foreign(rule: str, rules: tuple[str, ...]) -> frozenset[str]:
    found: frozenset[str] = frozenset()
    return found.union(*(_state_keys(other) for other in rules)) - _state_keys(rule)


def stands(
    layout: ParamLayout, state: Mapping[str, Any], values: Mapping[str, Any], foreign: set[str]
) -> dict[str, Any]:
    """What stays in a state beside the ``values`` of its layout: what is the user's own, and moments that are switched
    off at present, which go on from there when they are switched on again, as torch.optim's do; not what is
    :func:`of_another_rule`."""
    here = here_names(layout) | {"step"} | MASTER_KEYS | foreign
    return {key: value for key, value in state.items() if key not in values and key.partition(".")[0] not in here}


def is_own(rule: str, key: str) -> bool:
    """Whether a key of a state is the user's own, and means nothing to the optimizer."""
    return key.partition(".")[0] not in _state_keys(rule)


@lru_cache(maxsize=64)
def _state_keys(rule: str) -> frozenset[str]:
    """What an optimizer of this rule keeps, with everything switched on."""
    keeps = RULES[rule]
    on = {**keeps.hyperparameters, **dict.fromkeys(keeps.moments_by, 0.5)}
    return frozenset({m.name for m in keeps.moments(on, (2, 2))} | {"step"} | MASTER_KEYS)


def own_entries(rule: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """What the user has put into a state beside what the optimizer keeps there."""
    return {key: value for key, value in state.items() if is_own(rule, key)}


def taken_over(layout: ParamLayout, here: Here, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``state`` means in this layout, by key, in memory anywhere: every part of every moment, what the master
    keeps, and "step". None where it means nothing: a moment of another size, say.

    A moment that is not there begins, at zero or as its rule says; so does a master, of which zeros stand for the
    weights as they are.
    """
    found: dict[str, Any] = {}
    step = _count(state.get("step"))
    if step is None and "step" in state:
        return None
    for order, one in enumerate(layout.moments):
        parts = _moment(layout, here, one, order, state, int(step or 0))
        if parts is None:
            return None
        found.update(parts)
    for key, spec in layout.master.layout(layout.rows, layout.dtype).items():
        value = state.get(key)
        if key in state and not (isinstance(value, Tensor) and value.shape == spec.shape and _has_data(value, here)):
            return None
        # One of another dtype stood beside weights that were of another one, too.
        fits = isinstance(value, Tensor) and value.dtype is getattr(torch, spec.dtype)
        found[key] = value if fits else _zeros(spec)
    if layout.rule.inner == "sgd" and "momentum_buffer" in here_names(layout):
        step = _sgd_count(layout, here, state, step)
    found["step"] = float(step or 0)
    return found


def here_names(layout: ParamLayout) -> set[str]:
    return {one.moment.name for one in layout.moments}


def _sgd_count(layout: ParamLayout, here: Here, state: Mapping[str, Any], step: float | None) -> float:
    """torch.optim.SGD takes the first gradient for the buffer where there is none, and ours does so at the first step:
    a buffer that was given alone is not to be replaced, and one that begins later is to begin so."""
    if any(key.partition(".")[0] == "momentum_buffer" for key in state):
        return max(step or 0.0, 1.0)
    damped = bool(here.h.get("dampening")) and not layout.rule.wrapper
    return 0.0 if damped else step or 0.0


def _count(value: Any) -> float | None:
    """A number of steps, or None for what is none."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else None
    return float(value) if isinstance(value, (int, float)) else None


def _moment(
    layout: ParamLayout, here: Here, one: MomentLayout, order: int, state: Mapping[str, Any], step: int
) -> dict[str, Tensor] | None:
    """The parts of one moment, or None where what is given cannot be it."""
    moment, fmt = one.moment, one.format
    expected = {key: layout.tensors[key] for _, key in one.keys}
    coded = all(part for part, _ in one.keys)
    if coded and moment.name in state:
        values = _rows(here, state[moment.name])
        if values is None or (not moment.signed and bool((values < 0).any())):
            return None
        parts = {part: _zeros(expected[key]).to(here.p.device) for part, key in one.keys}
        shard = Shard(layout.rows, dither.key(layout.seed, layout.index, order), moment.turn(step), here.total)
        fmt.write(values.to(here.p.device, torch.float32), parts, moment, shard)
        return {key: parts[part] for part, key in one.keys}
    there = [key for key in expected if key in state]
    if not there and any(key.startswith(f"{moment.name}.") for key in state):
        return None  # it is kept in 32 bits here, and what is there is a code
    if not there:
        begins = moment.begins == "the parameter"
        return {key: here.p.detach().float() if begins else _zeros(spec) for key, spec in expected.items()}
    if len(there) < len(expected):
        return None
    found = {}
    for key, spec in expected.items():
        value, dtype = state[key], getattr(torch, spec.dtype)
        if isinstance(value, Tensor) and value.dtype is dtype and value.shape == spec.shape and _has_data(value, here):
            found[key] = value
        elif coded:  # another code is no number that could be converted
            return None
        else:
            values = _rows(here, value)
            if values is None or tuple(values.shape) != spec.shape:
                return None
            found[key] = values
    return found


def _zeros(spec: TensorSpec) -> Tensor:
    return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))


def _has_data(value: Tensor, here: Here) -> bool:
    """A tensor on the meta device has none to take over, but beside a parameter that has none either."""
    return not value.is_meta or here.p.is_meta


def _rows(here: Here, value: Any) -> Tensor | None:
    """The rows that are here of a moment in the parameter's shape, or None for anything else."""
    if (
        not isinstance(value, Tensor)
        or value.is_complex()
        or value.layout is not torch.strided
        or not _has_data(value, here)
    ):
        return None
    value = value.detach()
    if type(value) is Tensor and tuple(value.shape) == here.local:
        return value
    return here.rows_of(value) if value.shape == here.shape else None
