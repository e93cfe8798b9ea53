"""How far a weight of ours may be from the twin's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tests.twin.cases import BOUND, LOW, RTOL, TIES

if TYPE_CHECKING:
    from tests.twin.machine import Twin


def bound(t: Twin, name: str, q: Tensor) -> float:
    largest = float(q.abs().max())
    slack = RTOL * max(largest, t.way[name], 1e-3)
    sign = 3.0 if "lion" in t.case.spec and t.formats != {"32bit"} else 0.0
    slack += max(sign, *(BOUND[f] for f in t.formats)) * t.way[name]
    if t.ours.of(name).dtype in LOW:
        slack += t.rounded[name] + 2.0**-8 * largest
    return slack


def group_decays(t: Twin, name: str) -> bool:
    group = t.theirs.group_of(name) if any(name in names for names in t.theirs.names()) else {}
    return bool(group.get("weight_decay"))


def difference(t: Twin, name: str, p: Tensor, q: Tensor) -> str:
    """What is wrong with ``p``, the twin being at ``q``; empty if nothing is."""
    if p.shape != q.shape:
        return f"{name} is {tuple(p.shape)}, the twin's {tuple(q.shape)}"
    if not q.numel() or not bool(q.isfinite().all()):
        return ""
    errors, allowed = (p.to(q.dtype) - q).abs(), bound(t, name, q)
    # A decay that is part of the gradient may nearly take it away: then a weight's rounding turns a first step.
    turns = t.rounded[name] > 0 and name in t.decayed
    near = bool((errors <= allowed + 2 * t.way[name] * turns).all())
    if near and int((errors > allowed).sum()) <= TIES * turns:
        return ""
    return (
        f"{name} {tuple(q.shape)} is {float(errors.max()):.3g} from the twin's, {allowed:.3g} is allowed "
        f"(the largest is {float(q.abs().max()):.3g}, the way gone {t.way[name]:.3g})"
    )
