"""Operations on rows: appended, selected, reset; by our methods on ours, by hand on the twin."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from tests.twin.machine import LOW, Skip, Twin
from tests.twin.operations import operation
from tests.twin.stepping import not_released

#: Moments that a reset may take alone.
ALONE = ("exp_avg", "momentum_buffer")


def _rows(t: Twin, name: str, index: list[int]) -> None:
    """The twin's weight and state: these rows, zeros for -1; what stands for the weights begins as they are."""
    q = t.theirs.of(name)
    chosen = torch.tensor(index, dtype=torch.int64)
    state: dict[str, Any] = t.theirs.opt.state.get(q, {})
    factored = (q.dim() == 2 and "row_var" in state) or (q.dim() == 2 and any(k.endswith(".row") for k in state))
    means = {k: x.mean() for k, x in state.items() if k in ("row_var",) or k.endswith(".row")} if factored else {}
    for key, x in list(state.items()):
        if not isinstance(x, Tensor) or key == "step" or (factored and (key == "col_var" or key.endswith(".col"))):
            continue
        state[key] = _picked(x, chosen)
    for key, mean in means.items():
        col = "col_var" if key == "row_var" else key[: -len("row")] + "col"
        state[col] = state[col] * (state[key].mean() / mean) if mean else torch.zeros_like(state[col])


def _picked(x: Tensor, index: Tensor) -> Tensor:
    found = x.index_select(0, index.clamp(min=0))
    found[index < 0] = 0
    return found


def _movable(t: Twin, r: Random) -> str:
    not_released(t)
    if t.edited:
        raise Skip
    name = t.pick(r, lambda n: t.ours.of(n).dim() > 0 and t.ours.of(n).numel() > 0)
    if t.ours.opt.spec.rule == "adammini" and t.ours.of(name).dim() < 2:
        raise Skip  # its means are of 256 elements, of which other ones are together afterwards
    return name


@operation(3)
def append_rows(t: Twin, r: Random) -> None:
    name, kind = _movable(t, r), r.randrange(3)
    p, q = t.ours.of(name), t.theirs.of(name)
    count, more = len(q), r.choice([1, 3, 60])
    new = t.draw(r, [name], 0.5)[name][:1].expand(more, *q.shape[1:]).contiguous()
    _rows(t, name, [*range(count), *[-1] * more])
    weights = torch.cat([q.detach(), new.to(q.dtype)])
    if kind == 0:
        t.ours.opt.append_rows(p, new)
    elif kind == 1:
        p.data = torch.cat([p.detach(), new.to(p.dtype)])
        p.grad = None
        t.ours.opt.append_rows(p)
    else:
        other = nn.Parameter(torch.cat([p.detach(), new.to(p.dtype)]), requires_grad=p.requires_grad)
        t.ours.opt.append_rows(p, into=other)
        t.ours.model.register_parameter(name, other)
    _their_weights(t, name, weights)
    if "slow" in t.theirs.opt.state.get(q, {}):
        t.theirs.opt.state[q]["slow"][count:] = weights[count:]


def _their_weights(t: Twin, name: str, weights: Tensor) -> None:
    q = t.theirs.of(name)
    q.grad = None
    q.data = weights.contiguous()


@operation(3)
def select_rows(t: Twin, r: Random) -> None:
    """Pruned, reordered, or some twice."""
    name, kind = _movable(t, r), r.randrange(3)
    p, q = t.ours.of(name), t.theirs.of(name)
    count = len(q)
    index = [r.randrange(count) for _ in range(r.randint(1, count + 2))] if kind == 0 else list(range(count))
    if kind == 1:
        index = sorted(r.sample(index, r.randint(1, count)))
    _rows(t, name, index)
    weights = q.detach()[index]
    if kind == 1 and r.random() < 0.5:
        mask = torch.zeros(count, dtype=torch.bool)
        mask[index] = True
        t.ours.opt.select_rows(p, mask)
    elif kind == 2:
        other = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        t.ours.opt.select_rows(p, index, into=other)
        t.ours.model.register_parameter(name, other)
    else:
        t.ours.opt.select_rows(p, index)
    _their_weights(t, name, weights)


@operation(3)
def reset_state(t: Twin, r: Random) -> None:
    """All moments of some rows or of a whole parameter, or the first moment alone."""
    if t.edited:
        raise Skip
    name = t.pick(r, t.stepped)
    p, q = t.ours.of(name), t.theirs.of(name)
    state = t.theirs.opt.state[q]
    rows = None
    if q.dim() > 0 and q.numel() and r.random() < 0.5:
        rows = sorted(r.sample(range(len(q)), r.randint(1, len(q))))
    names = [k for k in ALONE if isinstance(state.get(k), Tensor)]
    alone = names[0] if names and r.random() < 0.5 else None
    if rows is not None and "adammini" in t.ours.opt.spec.rule and q.dim() < 2:
        raise Skip
    t.ours.opt.reset_state(p, alone, rows=rows)
    for key in [alone] if alone else [k for k in state if isinstance(state[k], Tensor) and k != "step"]:
        if key == "slow":
            value = q.detach() if t.case.dtype not in LOW else p.detach().float()
            if rows is None:
                state[key].copy_(value)
            else:
                state[key][rows] = value[rows].to(state[key].dtype)
        elif rows is None:
            state[key].zero_()
        elif not (q.dim() == 2 and (key == "col_var" or key.endswith(".col"))):
            before = state[key].mean() if key == "row_var" or key.endswith(".row") else None
            state[key][rows] = 0
            if before is not None and q.dim() == 2:
                col = "col_var" if key == "row_var" else key[: -len("row")] + "col"
                state[col].mul_(state[key].mean() / before if before else 0.0)


@operation(1)
def surgery_refused(t: Twin, r: Random) -> None:
    """Rows that are not there, and weights of another shape: one sentence, and nothing has changed."""
    name = t.pick(r, lambda n: t.stepped(n) and t.ours.of(n).dim() > 1 and t.ours.of(n).numel() > 0)
    p, opt = t.ours.of(name), t.ours.opt
    bad: list[Any] = [
        lambda: opt.append_rows(p, torch.zeros(1, *p.shape)),
        lambda: opt.select_rows(p, torch.ones(len(p) + 1, dtype=torch.bool)),
        lambda: opt.select_rows(p, [0.5]),
        lambda: opt.select_rows(nn.Parameter(torch.zeros(2, 2)), [0]),
        lambda: opt.select_rows(p, [0], into=nn.Parameter(torch.zeros(2, 2, 2, 2, 2))),
        lambda: opt.reset_state(p, "no_such_moment"),
        lambda: opt.reset_state(p, step=-1),
    ]
    if opt.state[p].keys() - {"step"}:  # without moments there are no rows to have been appended or not
        bad.append(lambda: opt.append_rows(p))
    t.refused(r.choice(bad))
