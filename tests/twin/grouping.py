"""Operations on groups: hyperparameters by hand and by schedules, groups and parameters that come and go."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import nn

from tests.twin.hyper import LR
from tests.twin.machine import LOW, Difference, Skip, Twin
from tests.twin.mixed import given, rule_of
from tests.twin.operations import operation
from tests.twin.stepping import not_released


@operation()
def freeze(t: Twin, r: Random) -> None:
    """Frozen or unfrozen; the state stays."""
    not_released(t)
    name = t.pick(r)
    wanted = not t.ours.of(name).requires_grad
    for side in t.sides:
        side.of(name).requires_grad_(wanted)
        side.of(name).grad = None


@operation()
def add_group(t: Twin, r: Random) -> None:
    not_released(t)
    if len(t.names) > 6 or t.case.overrides:
        raise Skip
    from tests.twin.cases import SHAPES

    name = _new_parameter(t, r, r.choice([s for s in SHAPES if s != (0, 7)]))
    lr = r.choice(LR)
    first = {k: v for k, v in given(t.ours.opt.spec, t.ours.opt.param_groups[0]).items() if k != "lr"}
    if t.ours.opt.spec.is_mixed:
        first = {}  # of another rule, perhaps
    for side in t.sides:
        p: Any = side.of(name)
        keep = {k: v for k, v in first.items() if k in side.opt.param_groups[0]}
        if t.ours.opt.spec.is_mixed and not side.ours:
            keep = given(t.ours.opt.spec, t.ours.opt.param_groups[-1])
        side.opt.add_param_group({"params": [(name, p)] if side.ours and t.case.named else [p], **keep, "lr": lr})
    t.ours.scheduler = t.theirs.scheduler = None  # torch's know the groups that they were made with


def _new_parameter(t: Twin, r: Random, shape: tuple[int, ...]) -> str:
    name = f"w{t.count}"
    t.count += 1
    g = torch.Generator().manual_seed(r.randrange(2**31))
    x = torch.randn(shape, generator=g).to(t.case.dtype)
    for side in t.sides:
        value = x.clone() if side.ours else (x.float() if x.dtype in LOW else x.clone())
        side.model.register_parameter(name, nn.Parameter(value))
    t.way[name] = t.rounded[name] = 0.0
    return name


@operation(1)
def refused_group(t: Twin, r: Random) -> None:
    """Groups that mean nothing leave the optimizer as it was."""
    p = nn.Parameter(torch.zeros(3))
    again = t.ours.of(t.pick(r))
    bad: list[Any] = [
        {"params": [again]},
        {"params": [p], "lr": -1.0},
        {"params": [p], "lr": "1e-4"},
        {"params": [p], "weight_decay": float("nan")},
        {"params": [torch.zeros(3, dtype=torch.int64).float().requires_grad_() * 2]},
    ]
    t.refused(lambda: t.ours.opt.add_param_group(r.choice(bad)))


@operation(1)
def empty_group(t: Twin, r: Random) -> None:
    first = given(t.ours.opt.spec, t.ours.opt.param_groups[0])
    for side in t.sides:
        keep = {k: v for k, v in first.items() if k in side.opt.param_groups[0]}
        side.opt.add_param_group({**keep, "params": [], "lr": 1e-3, "weight_decay": 0.0})
    t.ours.scheduler = t.theirs.scheduler = None


@operation()
def remove_group(t: Twin, r: Random) -> None:
    """A group is deleted; its parameters come back later, perhaps, by ``come_back``."""
    not_released(t)
    if len(t.ours.opt.param_groups) < 2:
        raise Skip
    i = r.randrange(len(t.ours.opt.param_groups))
    if len(t.names) <= len(t.ours.opt.param_groups[i]["params"]):
        raise Skip
    for side in t.sides:
        del side.opt.param_groups[i]
        side.scheduler = None


@operation()
def remove_parameter(t: Twin, r: Random) -> None:
    """Taken out of its group, as pruning does; with its state or without."""
    not_released(t)
    if len(t.names) < 2:
        raise Skip
    name, state_too = t.pick(r), r.random() < 0.5
    for side in t.sides:
        group, p = side.group_of(name), side.of(name)
        group["params"] = [q for q in group["params"] if q is not p]
        if state_too:
            side.opt.state.pop(p, None)
            t.lost_master(name)
    repr(t.ours.opt)  # before the group changes again, for a name is that of the place


def _of_its_rule(t: Twin, name: str, i: int) -> None:
    """Skip where this group is of another rule than the parameter."""
    if t.ours.opt.spec.rule_of(t.ours.opt.param_groups[i]) != rule_of(t, name):
        raise Skip


@operation()
def come_back(t: Twin, r: Random) -> None:
    """A parameter that was taken out is put into a group again."""
    not_released(t)
    out = [n for n, _ in t.ours.model.named_parameters() if n not in t.names]
    if not out:
        raise Skip
    name, i = r.choice(out), r.randrange(len(t.ours.opt.param_groups))
    _of_its_rule(t, name, i)
    for side in t.sides:
        side.opt.param_groups[i]["params"].append(side.of(name))
    if t.case.named:  # an optimizer that was made without it cannot know its name
        t.ours.opt.param_groups[i]["param_names"] = t.ours.names()[i]
        list(t.ours.opt.params.entries())  # names that were given by hand are those of places until somebody looks


@operation()
def reorder(t: Twin, r: Random) -> None:
    """Parameters of a group in another order, or one in another group: what a parameter has goes with it."""
    not_released(t)
    groups = t.ours.opt.param_groups
    if r.random() < 0.5:
        i = r.randrange(len(groups))
        order = list(range(len(groups[i]["params"])))
        r.shuffle(order)
        for side in t.sides:
            params = side.opt.param_groups[i]["params"]
            side.opt.param_groups[i]["params"] = [params[k] for k in order]
        return
    if len(groups) < 2:
        raise Skip
    name, i = t.pick(r), r.randrange(len(groups))
    _of_its_rule(t, name, i)
    for side in t.sides:
        group, p = side.group_of(name), side.of(name)
        group["params"] = [q for q in group["params"] if q is not p]
        side.opt.param_groups[i]["params"].append(p)


@operation(1)
def swap_parameter(t: Twin, r: Random) -> None:
    """Another Parameter in the place of one, the state moved over by hand."""
    not_released(t)
    name = t.pick(r)
    for side in t.sides:
        old = side.of(name)
        new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        group = side.group_of(name)
        group["params"][next(i for i, q in enumerate(group["params"]) if q is old)] = new
        if old in side.opt.state:
            side.opt.state[new] = side.opt.state.pop(old)
        side.model.register_parameter(name, new)
    repr(t.ours.opt)  # before the group changes again, for a name is that of the place


@operation(1)
def notes(t: Twin, r: Random) -> None:
    """A key of the user's own in a group stays there."""
    for side in t.sides:
        side.opt.param_groups[0]["my_note"] = "mine"
    t.step(r)
    if t.ours.opt.param_groups[0].get("my_note") != "mine":
        raise Difference("a note in a group is gone")
