"""Muon in kernels: momentum and update in one pass over each matrix, decay and step in another. The products between
the two are torch's (:mod:`memopt.kernels.newton_schulz`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from memopt.core.ledger import dtype_name
from memopt.kernels import abi, pack
from memopt.kernels.loader import library
from memopt.layout.param import ParamLayout
from memopt.masters import MASTERS

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.param_step import Work

#: Formats of the momentum that the first pass takes.
FORMATS = ("32bit", "bf16", "8bit", "fp8", "4bit")


def refuse(layout: ParamLayout, p: Tensor, g: Tensor) -> str | None:
    """Why this parameter is stepped by the plain torch path, or None."""
    if not (p.is_cpu and g.is_cpu):
        return f"the kernels are for the CPU, and it is on {p.device}"
    if library() is None:
        return "there are no kernels"
    if p.dtype not in pack.DTYPES or g.dtype not in pack.DTYPES:
        return f"the kernels take fp32, bf16 and fp16, and it is {str(p.dtype).removeprefix('torch.')}"
    if layout.modifiers:
        return f"there is no kernel for {layout.rule.name} with {', '.join(layout.modifiers)}"
    formats = [m.format.name for m in layout.moments]
    if layout.rule.name != "muon" or len(formats) != 1 or formats[0] not in FORMATS:
        names = ", ".join(m.moment.name for m in layout.moments)
        return f"there is no kernel for {layout.rule.name} with {names} in {layout.asked}"
    return pack.refuse(_applied(layout), p, g)


def update(works: Sequence[Work], into: Sequence[Tensor], seed: int) -> None:
    """The momentum of each work takes its gradient up, and ``into`` [rows.local_shape], contiguous, in the dtype of
    the products, becomes the update that is to be made orthogonal."""

    def group(work: Work) -> abi.Group:
        made = _group(work, 1.0)
        made.flags |= abi.MOMENTUM
        return made

    both = zip(works, into, strict=True)
    _run([w._replace(layout=_made(w.layout, u), p=u, groups=()) for w, u in both], group, lambda w: w.scale, seed)


def apply(works: Sequence[Work], found: Sequence[Tensor], ratios: Sequence[float], seed: int) -> None:
    """``p <- p - lr * weight_decay * p - lr * ratio * x`` for each work, x [rows.local_shape] being ``found``."""

    def group(work: Work) -> abi.Group:
        made = _group(work, ratio[work.index])
        made.gradient_scale, made.flags = 1.0, abi.DECOUPLED
        return made

    ratio = {work.index: r for work, r in zip(works, ratios, strict=True)}
    both = zip(works, found, strict=True)
    stepped = [w._replace(layout=_applied(w.layout), g=x, groups=()) for w, x in both]
    _run(stepped, group, lambda w: ratio[w.index], seed)


def _group(work: Work, ratio: float) -> abi.Group:
    made = pack.describe_group(work.layout.rule, work.h, work.scale)
    made.rule, made.d = abi.MUON, ratio
    return made


def _run(works: Sequence[Work], group: Callable[[Work], abi.Group], by: Callable[[Work], float], seed: int) -> None:
    found = library()
    assert found is not None
    groups: list[abi.Group] = []
    numbers: dict[tuple[int, float], int] = {}
    tensors = (abi.TensorStep * len(works))()
    for target, work in zip(tensors, works, strict=True):
        key = id(work.h), by(work)
        if key not in numbers:
            numbers[key] = len(groups)
            groups.append(group(work))
        pack.describe_tensor(target, work, numbers[key])
    packed = (abi.Group * len(groups))(*groups)
    threads = torch.get_num_threads()
    if found.handle.memopt_step(
        ctypes.byref(packed),
        ctypes.byref(tensors),
        len(works),
        seed & 0xFFFFFFFF,
        threads,
        found.index,
        abi.ALONE,
        False,
    ):
        raise MemoryError("the kernels could not allocate their list of tensors; nothing was changed")


# Layouts of the two passes, kept with the parameter's ------------------------------------------------------------


def _made(layout: ParamLayout, u: Tensor) -> ParamLayout:
    """The momentum is its state, and the update its parameter."""
    return _cached(layout, u.dtype, lambda: _of(layout, dtype_name(u), layout.moments, MASTERS["none"]))


def _applied(layout: ParamLayout) -> ParamLayout:
    """The master is its state."""
    return _cached(layout, "applied", lambda: _of(layout, layout.dtype, (), layout.master))


def _cached(layout: ParamLayout, key: Any, make: Callable[[], ParamLayout]) -> ParamLayout:
    passes = pack.facts(layout).passes
    if key not in passes:
        passes[key] = pack.set_facts(make())
    return passes[key]


def _of(layout: ParamLayout, dtype: str, moments: Any, master: Any) -> ParamLayout:
    return ParamLayout(
        layout.name,
        layout.index,
        layout.rows,
        dtype,
        layout.rule,
        moments,
        master,
        layout.placement,
        layout.seed,
        asked=layout.asked,
    )


__all__ = ["FORMATS", "apply", "refuse", "update"]
