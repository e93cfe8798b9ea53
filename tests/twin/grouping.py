"""Operations on groups: hyperparameters by hand and by schedules, groups and parameters that come and go."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import nn

import memopt
from tests.twin.machine import LOW, Difference, Skip, Twin
from tests.twin.operations import operation
from tests.twin.sides import Side
from tests.twin.stepping import not_released

LR = [0.0, 1e-3, 1e-2, 2e-2]


@operation(3)
def rate(t: Twin, r: Random) -> None:
    i, lr = r.randrange(len(t.ours.opt.param_groups)), r.choice(LR)
    for side in t.sides:
        side.opt.param_groups[i]["lr"] = lr


@operation(1)
def rate_tensor(t: Twin, r: Random) -> None:
    lr = r.choice(LR)
    i = r.randrange(len(t.ours.opt.param_groups))
    t.ours.opt.param_groups[i]["lr"] = torch.tensor(lr, dtype=torch.float64)
    t.theirs.opt.param_groups[i]["lr"] = lr
    t.step(r)
    t.ours.opt.param_groups[i]["lr"] = lr


@operation()
def decay(t: Twin, r: Random) -> None:
    value = r.choice([0.0, 0.1, 0.01])
    for side in t.sides:
        for group in side.opt.param_groups:
            group["weight_decay"] = value


@operation()
def betas(t: Twin, r: Random) -> None:
    group = t.ours.opt.param_groups[0]
    key = r.choice([k for k in ("betas", "alpha", "momentum", "eps", "dampening") if k in group] or [""])
    values: dict[str, list[Any]] = {
        "betas": [(0.5, 0.9, 0.99)[: len(group.get("betas", ()))], (0.9, 0.98, 0.995)[: len(group.get("betas", ()))]],
        "alpha": [0.9, 0.95],
        "momentum": [0.5, 0.8],
        "eps": [1e-6],
        "dampening": [0.1],
    }
    if not key or not group[key] or isinstance(group[key], tuple) != (key == "betas"):
        raise Skip  # momentum that is switched on is an operation of its own
    if key == "alpha" and "t_alpha" in group:
        raise Skip
    value = r.choice(values[key])
    for side in t.sides:
        side.opt.param_groups[r.randrange(1)][key] = value


@operation(1)
def maximize(t: Twin, r: Random) -> None:
    for side in t.sides:
        side.opt.param_groups[0]["maximize"] = not side.opt.param_groups[0]["maximize"]


@operation()
def switch(t: Twin, r: Random) -> None:
    """A hyperparameter that creates state, on or off."""
    group = t.ours.opt.param_groups[0]
    key = r.choice([k for k in ("momentum", "amsgrad", "centered") if k in group] or [""])
    if not key or group.get("nesterov") or group.get("dampening"):
        raise Skip
    if "sgd" in t.ours.opt.spec.rule and t.ours.opt.spec.format != "32bit":
        raise Skip  # the plain path is made anew for a comparison, and refuses what keeps no state
    value: Any = (0.9 if not group[key] else 0.0) if key == "momentum" else not group[key]
    before = t.ours.opt.param_groups[0][key]
    for side in t.sides:
        side.opt.param_groups[0][key] = value
    _as_ours_begins(t, key)
    g = t.draw(r)

    def do(side: Side) -> None:
        side.gradients(g)
        side.step()

    done = t.advance(do, r, may_refuse="centered=True|amsgrad|momentum|sgd without")
    if not done:
        for side in t.sides:
            side.opt.param_groups[0][key] = before


def _as_ours_begins(t: Twin, key: str) -> None:
    """torch.optim has no state for what is switched on later, but SGD's buffer: ours begins at zero."""
    if t.ours.opt.rule.name == "sgd" or not isinstance(t.theirs.opt, torch.optim.Optimizer):
        return
    moment = {"momentum": "momentum_buffer", "amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}[key]
    for p in t.theirs.opt.param_groups[0]["params"]:
        if t.theirs.opt.state.get(p):
            t.theirs.opt.state[p].setdefault(moment, torch.zeros_like(p))


@operation(1)
def wrong_value(t: Twin, r: Random) -> None:
    """A value that is no number is refused at the next step, which changes nothing."""
    group = t.ours.opt.param_groups[0]
    key, value = r.choice([("lr", "1e-4"), ("lr", float("nan")), ("weight_decay", "0.1")])
    before, group[key] = group[key], value
    t.ours.gradients(t.draw(r))
    t.refused(t.ours.step, key)
    group[key] = before
    t.ours.opt.zero_grad()


@operation(3)
def schedule(t: Twin, r: Random) -> None:
    """torch's schedulers, attached to both; stepped where they are there."""
    if t.ours.scheduler is not None and r.random() < 0.8:
        for side in t.sides:
            side.scheduler.step()
        return
    if any(torch.is_tensor(g["lr"]) or g["lr"] is None for g in t.ours.opt.param_groups):
        raise Skip
    s, period = torch.optim.lr_scheduler, r.randint(2, 5)
    make = r.choice(
        [
            lambda o: s.StepLR(o, period, gamma=0.5),
            lambda o: s.CosineAnnealingLR(o, T_max=10 * period),
            lambda o: s.LambdaLR(o, lambda n: 1 / (1 + n / period)),
            lambda o: s.LinearLR(o, start_factor=0.5, total_iters=period),
        ]
    )
    for side in t.sides:
        for group in side.opt.param_groups:
            group.pop("initial_lr", None)
        side.scheduler = make(side.opt)


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
    known = t.ours.opt.rule.hyperparameters
    first = {k: v for k, v in t.ours.opt.param_groups[0].items() if k in known and k != "lr"}
    for side in t.sides:
        p: Any = side.of(name)
        keep = {k: v for k, v in first.items() if k in side.opt.param_groups[0]}
        side.opt.add_param_group({"params": [(name, p)] if side.ours and t.case.named else [p], "lr": lr, **keep})
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
    for side in t.sides:
        side.opt.add_param_group({"params": [], "lr": 1e-3, "weight_decay": 0.0})
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


@operation()
def come_back(t: Twin, r: Random) -> None:
    """A parameter that was taken out is put into a group again."""
    not_released(t)
    out = [n for n, _ in t.ours.model.named_parameters() if n not in t.names]
    if not out:
        raise Skip
    name, i = r.choice(out), r.randrange(len(t.ours.opt.param_groups))
    for side in t.sides:
        side.opt.param_groups[i]["params"].append(side.of(name))
    if t.case.named:  # an optimizer that was made without it cannot know its name
        t.ours.opt.param_groups[i]["param_names"] = t.ours.names()[i]


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


@operation(1)
def our_schedule(t: Twin, r: Random) -> None:
    """memopt.schedule drives ours; the twin's rates are set to what they are."""
    total = r.randint(5, 20)
    if any(g["lr"] is None for g in t.ours.opt.param_groups):
        raise Skip
    for side in t.sides:
        side.scheduler = None
        for group in side.opt.param_groups:
            group.pop("initial_lr", None)
    made = memopt.schedule(t.ours.opt, r.choice(["cosine", "linear"]), warmup=1, total_steps=total)
    for _ in range(r.randint(1, 3)):
        for mine, other in zip(t.ours.opt.param_groups, t.theirs.opt.param_groups, strict=True):
            other["lr"] = mine["lr"]
            if "initial_lr" in mine:
                other["initial_lr"] = mine["initial_lr"]
        t.step(r)
        made.step()
    for mine, other in zip(t.ours.opt.param_groups, t.theirs.opt.param_groups, strict=True):
        other["lr"] = mine["lr"]
