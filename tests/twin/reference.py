"""One step of the plain path from where ours stands: what kernels, streams and plans must give, in every format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import memopt
from memopt.masters import MASTERS
from tests.twin.cases import TIES
from tests.twin.mixed import creatable, given, overridden
from tests.twin.sides import Bag, kernels_off

if TYPE_CHECKING:
    from tests.twin.machine import Twin

#: As in the tests of the kernels: sums in another order, and ties that fall the other way.
TOLERANCE = 1e-5


def step(t: Twin, gradients: Mapping[str, Tensor]) -> tuple[Bag, Any] | None:
    """Model and optimizer after a step on these gradients, of a copy without kernels, placement and partition."""
    ours = t.ours
    if t.edited or not creatable(t) or not any(ours.of(name).requires_grad for name in gradients):
        return None
    spec = ours.opt.spec
    overrides = {n: text.partition("@")[0] for n, text in spec.overrides.items() if n in t.names}
    spec = overridden(spec, {k: v for k, v in overrides.items() if v}, spec.rules)
    spec = spec.replace(placement="device", partition="none", options={})
    model = Bag({name: p.detach().clone() for name, p in ours.model.named_parameters()})
    groups: list[dict[str, Any]] = []
    for group in ours.opt.param_groups:
        named = [(name, getattr(model, name)) for name in (ours.name_of(p) for p in group["params"])]
        groups.append({"params": named if t.case.named else [p for _, p in named], **given(t.ours.opt.spec, group)})
    with kernels_off():
        opt = memopt.create(groups, spec, nonfinite="propagate", seed=ours.opt.seed)
        saved = ours.opt.state_dict()
        for group, mine in zip(saved["param_groups"], opt.param_groups, strict=True):
            group.pop("param_names", None)
            if "param_names" in mine:
                group["param_names"] = mine["param_names"]
        try:
            opt.load_state_dict(saved)
        except ValueError:  # state that is put right when it is stepped: a parameter that was in no group for a while
            return None
        for name, g in gradients.items():
            if ours.of(name).requires_grad:
                p = getattr(model, name)
                p.grad = g.to(p.dtype).clone()
        opt.step()
    return model, opt


def compare(t: Twin, expected: tuple[Bag, Any]) -> None:
    from tests.twin.machine import Difference

    model, opt = expected
    for name in t.names:
        p, q = t.ours.of(name), getattr(model, name)
        _near(f"{name}, against the plain path", p.detach(), q.detach(), Difference)
        mine, other = t.ours.opt.state.get(p, {}), opt.state.get(q, {})
        if mine.keys() != other.keys():
            raise Difference(f"{name} has state {sorted(mine)}, the plain path {sorted(other)}")
        master = MASTERS[t.ours.opt.spec.master if p.dtype in (torch.bfloat16, torch.float16) else "none"]
        for key, value in mine.items():
            if key == master.key:  # what both stand for; the bits beside a weight depend on its last one
                both = [master.read(w.detach(), x) for w, x in ((p, value), (q, other[key]))]
                slack = TOLERANCE if master.name in ("fp32", "split16") else 2.0**-13
                error = float((both[0] - both[1]).abs().max()) if value.numel() else 0.0
                if not error <= slack * float(both[1].abs().max() if value.numel() else 0.0):
                    raise Difference(f"{name} with its master is {error:.3g} from the plain path's")
            elif isinstance(value, Tensor):
                _near(f"{name}.{key}, against the plain path", value, other[key], Difference)


def _near(what: str, a: Tensor, b: Tensor, error: type[Exception]) -> None:
    if a.dtype != b.dtype or a.shape != b.shape:
        raise error(f"{what}: {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}")
    if not a.numel():
        return
    ours, theirs = _numbers(a), _numbers(b)
    if not bool(theirs.isfinite().all()):
        return
    slack = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(a.dtype, 0.0)
    whole = not a.is_floating_point() or a.dtype == torch.float8_e4m3fn
    near = (ours - theirs).abs() <= (0.5 if whole else TOLERANCE * float(theirs.abs().max()) + slack * theirs.abs())
    off = int((~near).sum())
    if off > (TIES if whole or slack else 0):
        raise error(f"{what}: {off} of {a.numel()} differ, by up to {float((ours - theirs).abs().max()):.3g}")


def _numbers(x: Tensor) -> Tensor:
    if x.dtype == torch.float8_e4m3fn:
        x = x.view(torch.uint8).int()
        return torch.where(x < 128, x, 128 - x).double()
    return x.detach().double()
