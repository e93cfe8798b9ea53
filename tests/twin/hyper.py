"""Operations on hyperparameters: rates, schedules, values that mean nothing."""

from __future__ import annotations

from random import Random
from typing import Any

import torch

import memopt
from tests.twin.machine import Skip, Twin
from tests.twin.operations import operation
from tests.twin.sides import Side

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
    if "sgd" in t.ours.opt.spec.rule_of(group) and t.ours.opt.spec.format != "32bit":
        raise Skip  # the plain path is made anew for a comparison, and refuses what keeps no state
    value: Any = (0.9 if not group[key] else 0.0) if key == "momentum" else not group[key]
    if isinstance(t.theirs.opt, memopt.Optimizer) and t.theirs.opt.spec.format != "32bit":
        raise Skip  # the twin may refuse what ours does for some, or since it was converted
    before = t.ours.opt.param_groups[0][key]
    for side in t.sides:
        side.opt.param_groups[0][key] = value
    g = t.draw(r)

    def do(side: Side) -> None:
        side.gradients(g)
        side.step()

    done = t.advance(do, r, may_refuse="centered=True|amsgrad|momentum|sgd without")
    if not done:
        for side in t.sides:
            side.opt.param_groups[0][key] = before


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
