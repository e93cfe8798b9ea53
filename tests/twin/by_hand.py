"""Operations on state and parameters by hand, as scripts do them to torch.optim."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.twin.cases import LOW
from tests.twin.closeness import bound, group_decays
from tests.twin.machine import Difference, Skip, Twin
from tests.twin.operations import operation
from tests.twin.sides import set_data
from tests.twin.stepping import not_released

#: Moments that may be replaced alone: a second moment of zeros under a first that is not would divide by nothing.
FIRST = ("exp_avg", "momentum_buffer")


def _first(t: Twin, name: str) -> str:
    theirs = t.theirs.state_of(name)
    found = [k for k in FIRST if isinstance(theirs.get(k), Tensor)]
    if not found:
        raise Skip
    return found[0]


def _with_first(t: Twin, name: str) -> bool:
    theirs = t.theirs.opt.state.get(t.theirs.of(name), {})
    return t.stepped(name) and any(isinstance(theirs.get(k), Tensor) for k in FIRST)


@operation()
def reset_by_hand(t: Twin, r: Random) -> None:
    """ReLoRA's reset: a moment in torch's layout, in some dtype, in the place of what is there."""
    not_released(t)
    name = t.pick(r, lambda n: _with_first(t, n) and t.ours.of(n).requires_grad)  # stepped, and so taken over, next
    t.current_moments()  # not one that is switched off
    key, dtype = _first(t, name), r.choice([torch.float32, torch.bfloat16, torch.float64])
    value = torch.zeros_like(t.theirs.of(name)).detach()
    seconds = [x for k, x in t.theirs.state_of(name).items() if k.endswith("_sq") or k == "square_avg"]
    if r.random() < 0.5 and all(bool((x > 0).all()) for x in seconds):  # or it would be divided by nothing
        value = t.draw(r, [name], 0.25)[name].to(value.dtype)
    t.ours.state_of(name)[key] = value.to(dtype)
    t.theirs.state_of(name)[key] = value.clone()
    t.edited = True
    t.step(r)


@operation()
def moment_in_place(t: Twin, r: Random) -> None:
    """A 32-bit moment changed in its own memory."""
    not_released(t)
    name = t.pick(r, lambda n: _with_first(t, n))
    key = _first(t, name)
    if key not in t.ours.state_of(name) or t.ours.opt.spec.for_parameter(name)[1] == "disk":
        raise Skip
    for side in t.sides:
        side.state_of(name)[key].mul_(0.5)


@operation()
def forget_state(t: Twin, r: Random) -> None:
    """The state of one parameter, or all of it, is deleted: it begins anew."""
    if t.case.dtype in LOW and any(group.get("weight_decay") for group in t.ours.opt.param_groups):
        raise Skip  # a first step goes by signs, and the sign of a gradient with decay may be that of its rounding
    if r.random() < 0.3:
        for side in t.sides:
            side.opt.state.clear()
        t.lost_master()
        return
    name = t.pick(r, t.stepped)
    for side in t.sides:
        side.opt.state.pop(side.of(name), None)
    t.lost_master(name)


@operation(1)
def own_keys(t: Twin, r: Random) -> None:
    """Numbers and tensors of the user's own in the state stay there."""
    name = t.pick(r, t.stepped)
    value: Any = r.choice([7, torch.arange(3.0)])
    t.ours.state_of(name)["mine"] = value
    t.step(r)
    if "mine" not in t.ours.state_of(name):
        raise Difference("what the user put into the state is gone")
    del t.ours.state_of(name)["mine"]


@operation()
def wrong_moment(t: Twin, r: Random) -> None:
    """A moment of another size is refused, and nothing is stepped; so is one that is no tensor."""
    not_released(t)
    name = t.pick(r, lambda n: _with_first(t, n) and t.ours.of(n).numel() > 1 and t.ours.of(n).requires_grad)
    state = t.ours.state_of(name)
    key = r.choice([k for k in state if k != "step"])
    before, value = state[key], r.choice([torch.zeros(1), torch.zeros(11, 3)])
    if not isinstance(before, Tensor) or before.numel() in (1, 33):
        raise Skip
    t.current_moments()
    state[key] = value
    t.ours.gradients(t.draw(r))
    t.refused(t.ours.step)
    state[key] = before
    t.ours.opt.zero_grad()
    t.ours.model.zero_grad()


@operation()
def weights_changed(t: Twin, r: Random) -> None:
    """In place, by ``load_state_dict`` of the model, or by other memory of the same size."""
    name, how = t.pick(r), r.randrange(3)
    value = t.draw(r, [name], 0.5)[name]
    if how == 2:
        not_released(t)
    for side in t.sides:
        p = side.of(name)
        if how == 0:
            with torch.no_grad():
                p.copy_(value)
        elif how == 1:
            side.model.load_state_dict({**side.model.state_dict(), name: value.to(p.dtype)})
        else:
            set_data(p, value.clone())
    t.lost_master(name)  # a correction of less than half a unit is taken for the new weight's


@operation(1)
def strided(t: Twin, r: Random) -> None:
    """The same weights in other strides."""
    not_released(t)
    name = t.pick(r, lambda n: t.ours.of(n).dim() == 2 and t.ours.of(n).numel() > 1)
    for side in t.sides:
        p = side.of(name)
        p.grad = None
        p.data = p.data.t().contiguous().t()


@operation()
def grown(t: Twin, r: Random) -> None:
    """The weight grows by .data and nobody tells the optimizer: refused, as torch does; then it is put back."""
    not_released(t)
    name = t.pick(r, lambda n: t.stepped(n) and t.ours.of(n).dim() >= 1 and t.ours.of(n).numel() > 0)
    p = t.ours.of(name)
    if not p.requires_grad or not any(isinstance(x, Tensor) and x.dim() for x in t.ours.state_of(name).values()):
        raise Skip  # without a moment there is nothing that it must fit
    t.current_moments()
    before = p.data
    more = r.choice([1, 40, 4000 if p.dim() == 1 else 60])
    if r.random() < 0.5 and len(p) > more:
        changed = before[: len(p) - more].clone()
    else:
        changed = torch.cat([before, before[:1].expand(more, *before.shape[1:])])
    set_data(p, changed)
    for n in t.names:
        if t.ours.of(n).requires_grad:
            t.ours.of(n).grad = torch.ones_like(t.ours.of(n))
    t.refused(t.ours.step, name if t.case.named else "")
    set_data(p, before)
    t.ours.opt.zero_grad()
    t.ours.model.zero_grad()


@operation(1)
def wrong_gradient(t: Twin, r: Random) -> None:
    """A gradient of the size that the weight had before."""
    not_released(t)
    name = t.pick(r, lambda n: t.ours.of(n).dim() == 2 and len(t.ours.of(n)) > 2 and t.ours.of(n).numel() > 0)
    p = t.ours.of(name)
    if not p.requires_grad:
        raise Skip
    t.ours.gradients(t.draw(r))
    full = p.grad
    assert full is not None
    full.data = full.data[:-1].clone()
    t.refused(t.ours.step, name if t.case.named else "")
    t.ours.opt.zero_grad()
    t.ours.model.zero_grad()


@operation()
def cast(t: Twin, r: Random) -> None:
    """``model.to(dtype)`` in mid-training, a few steps, and back; with a master or without."""
    not_released(t)
    if "lookahead" in t.case.spec:
        raise Skip  # the twin's slow weights follow weights that were not rounded
    t.formats.add("bf16")  # what a rule takes of rounded weights (their decay, their norm) is in its moments
    now = t.case.dtype
    other = torch.bfloat16 if now in (torch.float32, torch.float64) else torch.float32
    for name, q in t.theirs.model.named_parameters():
        if q.numel():
            t.rounded[name] += 2.0**-8 * float(q.detach().abs().max())
    t.ours.model.to(other)
    if other == torch.float32:  # from 16 bits: what stood beside the weights is gone or taken over
        t.lost_master()
    for _ in range(r.randint(0, 2)):
        g = t.draw(r)
        t.advance(lambda side, g=g: (side.gradients(g), side.step()), r)  # type: ignore[misc]
    t.ours.model.to(now)
    for name, q in t.theirs.model.named_parameters():
        p = t.ours.of(name)
        if now not in LOW and q.numel():  # weights in 16 bits have been rounded: the twin goes on from there
            # With a decay that is part of the gradient a rounded weight may turn the sign of a first step.
            turned = 2 * t.way[name] if group_decays(t, name) else 0.0
            if float((p.detach() - q.detach()).abs().max()) > bound(t, name, q) + 2 * t.rounded[name] + turned:
                raise Difference(f"{name} is too far from the twin's after a cast")
            q.data.copy_(p.detach())
        t.rounded[name] = t.rounded[name] if now in LOW else 0.0


@operation(1)
def init_state(t: Twin, r: Random) -> None:
    """State made before the first step is what the first step would have made."""
    t.ours.opt.init_state()


@operation(1)
def step_count(t: Twin, r: Random) -> None:
    """The number of steps set by hand."""
    not_released(t)
    name = t.pick(r, t.stepped)
    count = float(r.randint(1, 50))
    if "step" not in t.theirs.state_of(name) or t.ours.opt.spec.rule == "radam":
        raise Skip
    if "lookahead" in t.ours.opt.spec.rule:
        raise Skip
    kind = r.randrange(2)
    for side in t.sides:
        if kind == 0:
            side.state_of(name)["step"].fill_(count)
        else:
            side.state_of(name)["step"] = torch.tensor(count)
