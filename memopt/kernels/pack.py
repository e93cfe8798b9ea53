"""From a :class:`~memopt.engines.base.Work` to the descriptors that the kernels read, or the reason why not."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from memopt.core.rows import FLAT_ROW, Rows
from memopt.formats.rowmean import span
from memopt.kernels import abi
from memopt.rules.adafactor import FP32_EPS
from memopt.rules.lookahead import SLOW

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work
    from memopt.rules import Rule

DTYPES = {getattr(torch, name): code for name, code in abi.DTYPES.items()}


def describe_group(rule: Rule, h: Mapping[str, Any]) -> abi.Group:
    """The hyperparameters of a group, as Python floats have them."""
    g = abi.Group()
    g.rule = abi.RULES[rule.inner]
    g.flags = flags(rule, h)
    g.lr = 0.0 if h["lr"] is None else float(h["lr"])
    g.weight_decay = h["weight_decay"]
    g.d = h.get("d", 1.0)
    g.momentum = h.get("momentum", 0.0)
    g.dampening = h.get("dampening", 0.0)
    betas = h.get("betas", ())
    g.beta1, g.beta2, g.beta3 = (*betas, 0.0, 0.0, 0.0)[:3]
    g.slow_steps, g.slow_rate = h.get("lookahead_steps", 0), h.get("lookahead_rate", 0.0)
    eps = h.get("eps", 0.0)
    first, second = eps if isinstance(eps, (tuple, list)) else (eps, 0.0)
    g.eps, g.eps2 = FP32_EPS if first is None else first, second
    for name, value in rule.kernel_fields(h).items():
        if name in abi.HYPER:
            setattr(g, name, value)
    return g


def flags(rule: Rule, h: Mapping[str, Any]) -> int:
    own = rule.kernel_fields(h)
    chosen = {
        abi.MAXIMIZE: h["maximize"],
        abi.AMSGRAD: h.get("amsgrad"),
        abi.DECOUPLED: rule.decoupled(h),
        abi.NESTEROV: h.get("nesterov"),
        abi.CENTERED: h.get("centered"),
        abi.MOMENTUM: h.get("momentum") or own.get("MOMENTUM"),
        abi.TRANSFORMERS: h.get("convention") == "transformers",
        abi.SCALE_PARAMETER: h.get("scale_parameter"),
        abi.RELATIVE_STEP: h.get("relative_step"),
        abi.WARMUP_INIT: h.get("warmup_init"),
    }
    return sum(flag for flag, on in chosen.items() if on)


def format_of(layout: ParamLayout) -> str:
    """Format code passed to the kernel: that of all moments whose format is not fixed by the rule."""
    names = {m.format.name for m in layout.moments if not m.moment.held}
    return "factored" if "factored" in names else next(iter(names), "32bit")


def needs_ranks(layout: ParamLayout, world_size: int) -> str | None:
    """Which sums the ranks that share a parameter would have to exchange within a step, or None."""
    if cut := cuts_means(layout):
        return cut
    if world_size == 1:
        return None
    if layout.needs_whole:
        return f"{layout.rule.name} needs sums over {world_size} ranks between the passes of a kernel"
    return None


def cuts_means(layout: ParamLayout) -> str | None:
    """Why a mean of some elements may have to be taken on two ranks, or None."""
    # One process alone has such rows too.
    if layout.rows.flat != FLAT_ROW and any(m.format.name == "rowmean" for m in layout.moments):
        return f"{layout.rule.name} takes means of {FLAT_ROW} elements of a vector that may be cut between any two"
    return None


def refuse(layout: ParamLayout, p: Tensor, g: Tensor) -> str | None:
    """Why this parameter is stepped by the plain torch path, or None."""
    if not (p.is_cpu and g.is_cpu):
        return f"the kernels are for the CPU, and it is on {p.device}"
    if p.dtype not in DTYPES or g.dtype not in DTYPES:
        return f"the kernels take fp32, bf16 and fp16, and it is {str(p.dtype).removeprefix('torch.')}"
    rule, rows, fmt = layout.rule, layout.rows, format_of(layout)
    known = rule.wrapper in ("", "lookahead") and rule.inner in abi.RULES and fmt in abi.FORMATS
    if not known or any(m.moment.name not in (*abi.SLOT, SLOW.name) for m in layout.moments):
        return f"there is no kernel for {rule.name} in {layout.asked}"
    if layout.master.name not in abi.MASTERS:
        return f"there is no kernel for +{layout.master.name}"
    if p.dim() > 255:
        return f"the kernels take at most 255 dimensions, and it has {p.dim()}"
    if any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
        return "several of its elements lie in one place, which torch refuses to write"
    if layout.master.dithered and (rows.flat != FLAT_ROW or (fmt == "factored" and p.dim() > 2)):
        return f"the random bits of +{layout.master.name} begin within a row of the kernels' view"
    return cuts_means(layout)


def describe(target: abi.TensorStep, work: Work, group: int) -> None:
    """Fill ``target`` for a work that fits its layout."""
    layout, p, g = work.layout, work.p, work.g
    rows, master, fmt = layout.rows, layout.master, format_of(layout)
    ctypes.memset(ctypes.byref(target), 0, ctypes.sizeof(target))  # of another work, that was given up half-way
    if not (p.is_contiguous() and g.is_contiguous()):
        numbers = [*p.shape, *p.stride(), *g.stride()]
        target.layout, target.dims = (abi.c_int64 * len(numbers))(*numbers), p.dim()
    target.p, target.g = p.data_ptr(), g.data_ptr()
    target.step, target.index, target.group = work.step, work.index & 0xFFFFFFFF, group
    target.format, target.p_dtype, target.g_dtype = abi.FORMATS[fmt], DTYPES[p.dtype], DTYPES[g.dtype]
    target.numel, target.whole_numel = p.numel(), Rows.whole(rows.shape).numel
    target.first_row = rows.first
    target.cut = layout.needs_whole and (layout.partitioned or bool(work.groups))
    if fmt == "factored":
        shape = rows.local_shape
        target.cols = shape[-1]
        target.rows = p.numel() // max(shape[-1], 1)
        target.height = shape[-2]
        target.stacked = len(shape) > 2
        target.whole_height = rows.shape[-2]
    elif len(rows.shape) < 2 or (fmt == "32bit" and not master.dithered):
        # Without blocks and random bits it does not matter where rows begin.
        target.cols = FLAT_ROW if fmt != "32bit" or master.dithered else abi.CHUNK
        target.rows = target.height = -(-p.numel() // target.cols)
    else:
        target.rows = target.height = rows.count
        target.cols = rows.cols
    target.master = abi.MASTERS[master.name]
    if master.key:
        target.kept = work.state[master.key].data_ptr()
    for order, m in enumerate(layout.moments):
        tensors = [work.state[key] for _, key in m.keys]
        if m.moment is SLOW:
            target.slow = tensors[0].data_ptr()
            continue
        if m.format.name == "rowmean":
            target.span = span(rows)
        slot = abi.SLOT[m.moment.name]
        target.order[slot] = order
        target.data[slot] = tensors[0].data_ptr()
        target.aux[slot] = tensors[1].data_ptr() if len(tensors) > 1 else None


def dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order: then it can be read from end to end."""
    if x.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != filled:
                return False
            filled *= size
    return True


__all__ = ["DTYPES", "dense", "describe", "describe_group", "flags", "needs_ranks", "refuse"]
