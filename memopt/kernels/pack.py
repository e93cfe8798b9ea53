"""From a :class:`~memopt.engines.base.Work` to the descriptors that the kernels read, or the reason why not."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from memopt.core.rows import FLAT_ROW, Rows
from memopt.formats.rowmean import span
from memopt.kernels import abi
from memopt.rules.adafactor import FP32_EPS
from memopt.rules.lookahead import SLOW
from memopt.rules.matrices import matrices

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work
    from memopt.rules import Rule

DTYPES = {getattr(torch, name): code for name, code in abi.DTYPES.items()}


def describe_group(rule: Rule, h: Mapping[str, Any], scale: float = 1.0) -> abi.Group:
    """The hyperparameters of a group, as Python floats have them; ``scale`` is what its gradients are multiplied by."""
    g = abi.Group()
    g.gradient_scale = scale
    g.rule = abi.RULES.get(rule.inner, 0)  # one without a kernel has no tensors here
    g.flags = flags(rule, h)
    g.lr = 0.0 if h["lr"] is None else float(h["lr"])
    g.weight_decay = h["weight_decay"]
    g.d = h.get("d") or 1.0
    g.momentum = h.get("momentum", 0.0)
    g.dampening = h.get("dampening", 0.0)
    betas = h.get("betas", ())
    g.beta1, g.beta2, g.beta3 = (*betas, 0.0, 0.0, 0.0)[:3]
    g.slow_steps, g.slow_rate = h.get("lookahead_steps", 0), h.get("lookahead_rate", 0.0)
    eps = h.get("eps", 0.0)
    first, second = eps if isinstance(eps, (tuple, list)) else (eps, 0.0)
    g.eps, g.eps2 = FP32_EPS if first is None else first, second
    for name, value in rule.kernel_fields(h).items():
        if name in abi.HYPER or name in abi.CPU_HYPER:
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
        abi.TRANSFORMERS: h.get("convention") in ("transformers", "absolute"),
        abi.SCALE_PARAMETER: h.get("scale_parameter"),
        abi.RELATIVE_STEP: h.get("relative_step"),
        abi.WARMUP_INIT: h.get("warmup_init"),
        abi.SLICED_SUMS: h.get("sliced"),
        abi.CAUTIOUS: h.get("cautious"),
    }
    return sum(flag for flag, on in chosen.items() if on)


class Facts(NamedTuple):
    """What is the same at every step of a layout. ``refusal`` says why no kernel takes it, whatever its tensors;
    ``prototype`` has all fields of a descriptor that do not depend on tensors; ``pointers`` are the others, as
    ``(field, slot, state key)``. ``passes`` are the layouts of a rule whose step takes several passes by itself
    (:mod:`memopt.kernels.matrix_step`)."""

    cuts_means: str | None
    refusal: str | None
    prototype: abi.TensorStep
    pointers: tuple[tuple[str, int, str], ...]
    passes: dict[Any, ParamLayout]


def facts(layout: ParamLayout) -> Facts:
    """Worked out once for a layout."""
    if layout.facts is None:
        layout.facts = _facts(layout, _unknown(layout) or _refusal(layout))
    found: Facts = layout.facts
    return found


def set_facts(layout: ParamLayout) -> ParamLayout:
    """The same layout, for a pass of its rule that the caller knows there to be."""
    layout.facts = _facts(layout, _refusal(layout))
    return layout


def _facts(layout: ParamLayout, refusal: str | None) -> Facts:
    prototype, pointers = abi.TensorStep(), []
    if refusal is None:
        _fill(prototype, layout)
        pointers = _pointers(prototype, layout)
    return Facts(_cuts_means(layout), refusal, prototype, tuple(pointers), {})


def formats_of(layout: ParamLayout) -> set[str]:
    """The formats of the moments whose format is not fixed by the rule."""
    return {m.format.name for m in layout.moments if not m.moment.fixed_format}


def format_code(layout: ParamLayout) -> int:
    """Format code passed to the kernel: that of all moments, or of the way in which several formats stand together."""
    names = formats_of(layout)
    if len(names) < 2 and "factored" not in names:
        return abi.FORMATS[next(iter(names), "32bit")]
    if "factored" not in names:
        return abi.MIXED
    stack = len(layout.rows.shape) > 2 or layout.rows.unit > 1  # lines of a matrix are not rows
    if names <= {"factored", "32bit"}:  # lines of a stack are not the rows by which a master's random bits go
        return abi.MIXED_FACTORED if stack and layout.master.dithered else abi.FORMATS["factored"]
    together = {frozenset(("factored", "8bit")): abi.FACTORED_8, frozenset(("factored", "4bit")): abi.FACTORED_4}
    return abi.MIXED_FACTORED if stack else together.get(frozenset(names), abi.MIXED_FACTORED)


def needs_ranks(layout: ParamLayout, world_size: int) -> str | None:
    """Which sums the ranks that share a parameter would have to exchange within a step, or None."""
    if cut := facts(layout).cuts_means:
        return cut
    if world_size == 1:
        return None
    if layout.needs_whole:
        return f"{layout.rule.name} needs sums over {world_size} ranks between the passes of a kernel"
    return None


def _cuts_means(layout: ParamLayout) -> str | None:
    """Why a mean of some elements may have to be taken on two ranks, or None."""
    # One process alone has such rows too.
    rows = layout.rows
    if rows.may_cut and len(rows.shape) < 2 and any(m.format.name == "rowmean" for m in layout.moments):
        return f"{layout.rule.name} takes means of {FLAT_ROW} elements of a vector that may be cut between any two"
    return None


def _unknown(layout: ParamLayout) -> str | None:
    rule = layout.rule
    if layout.modifiers:
        return f"there is no kernel for {rule.name} with {', '.join(layout.modifiers)}"
    ours = rule.wrapper in ("", "lookahead") and rule.inner in abi.RULES and formats_of(layout) <= abi.FORMATS.keys()
    if not ours or any(m.moment.name not in (*abi.SLOT, SLOW.name) for m in layout.moments):
        return f"there is no kernel for {rule.name} in {layout.asked}"
    return None


def _refusal(layout: ParamLayout) -> str | None:
    rows, master = layout.rows, layout.master
    if master.name not in abi.MASTERS:
        return f"there is no kernel for +{master.name}"
    if layout.rule.inner == "sinkgd" and master.dithered and (matrices(rows.shape).stacked or rows.unit > 1):
        return f"the random bits of +{master.name} go by rows that are not the lines of its matrices"
    if rows.may_cut and any(m.format.name == "sliced" for m in layout.moments):
        return "every eleventh element is kept, and its rows may begin between any two"
    if len(rows.local_shape) > 255:
        return f"the kernels take at most 255 dimensions, and it has {len(rows.local_shape)}"
    if master.dithered and rows.may_cut:
        return f"the random bits of +{master.name} begin within a row of the kernels' view"
    return _cuts_means(layout)


def refuse(layout: ParamLayout, p: Tensor, g: Tensor) -> str | None:
    """Why this parameter is stepped by the plain torch path, or None."""
    if not (p.is_cpu and g.is_cpu):
        return f"the kernels are for the CPU, and it is on {p.device}"
    if p.dtype not in DTYPES or g.dtype not in DTYPES:
        return f"the kernels take fp32, bf16 and fp16, and it is {str(p.dtype).removeprefix('torch.')}"
    if not p.is_contiguous() and any(n == 0 and size > 1 for size, n in zip(p.shape, p.stride(), strict=True)):
        return "several of its elements lie in one place, which torch refuses to write"
    return facts(layout).refusal


def describe_tensor(target: abi.TensorStep, work: Work, group: int) -> None:
    """Fill ``target`` for a work that fits its layout."""
    layout, p, g, state = work.layout, work.p, work.g, work.state
    of_layout = facts(layout)
    ctypes.memmove(ctypes.byref(target), ctypes.byref(of_layout.prototype), _SIZE)
    if not (p.is_contiguous() and g.is_contiguous()):
        numbers = [*p.shape, *p.stride(), *g.stride()]
        target.layout, target.dims = (abi.c_int64 * len(numbers))(*numbers), p.dim()
    target.p, target.g = p.data_ptr(), g.data_ptr()
    target.step, target.group, target.g_dtype = work.step, group, DTYPES[g.dtype]
    if work.groups:
        target.cut = _takes_sums(layout)
    for field, slot, key in of_layout.pointers:
        if slot < 0:
            setattr(target, field, state[key].data_ptr())
        else:
            getattr(target, field)[slot] = state[key].data_ptr()


_SIZE = ctypes.sizeof(abi.TensorStep)


def _takes_sums(layout: ParamLayout) -> bool:
    """Whether a step sums over rows, which may be on several ranks."""
    return layout.needs_whole or bool(layout.rule.reports)


def _fill(target: abi.TensorStep, layout: ParamLayout) -> None:
    """The fields that are a layout's."""
    rows, master, numel, code = layout.rows, layout.master, layout.rows.numel, format_code(layout)
    full = code == abi.FORMATS["32bit"] and not master.dithered
    target.index = layout.index & 0xFFFFFFFF
    target.format, target.p_dtype = code, abi.DTYPES.get(layout.dtype, 0)
    target.numel, target.whole_numel = numel, Rows.whole(rows.shape).numel
    target.first_row = rows.first
    target.cut = _takes_sums(layout) and layout.partitioned
    target.master = abi.MASTERS[master.name]
    if len(rows.shape) < 2 or full:
        # Without blocks and random bits it does not matter where rows begin.
        target.cols = abi.CHUNK if full else FLAT_ROW
        target.rows = target.height = -(-numel // target.cols)
    else:
        target.rows = target.height = rows.count
        target.cols = rows.cols
    sliced = any(m.format.name == "sliced" for m in layout.moments)
    target.whole_cols = rows.cols if sliced else target.cols
    if layout.rule.inner == "sinkgd":
        one = matrices(rows.shape)
        target.span, target.whole_height, target.stacked = one.cols, one.rows, one.stacked
        target.height = one.rows if one.stacked else rows.bounds[1] - rows.bounds[0]
    elif "factored" in formats_of(layout):
        shape = rows.local_shape
        target.span, target.height, target.whole_height = shape[-1], shape[-2], rows.shape[-2]
        target.stacked = len(shape) > 2
        if code == abi.FORMATS["factored"]:
            target.cols, target.rows = target.span, numel // max(target.span, 1)


def _pointers(target: abi.TensorStep, layout: ParamLayout) -> list[tuple[str, int, str]]:
    """Where the addresses of the state go; the order of its moments and the span of their means."""
    found = [("kept", -1, layout.master.key)] if layout.master.key else []
    for order, m in enumerate(layout.moments):
        keys = [key for _, key in m.keys]
        if m.moment is SLOW:
            found.append(("slow", -1, keys[0]))
            continue
        if m.format.name == "rowmean":
            target.span = span(layout.rows)
        slot = abi.SLOT[m.moment.name]
        target.order[slot] = order
        target.formats[slot] = abi.FORMATS.get(m.format.name, 0)
        found += [("data", slot, keys[0]), *([("aux", slot, keys[1])] if len(keys) > 1 else [])]
    return found


def copy(target: abi.TensorStep, source: abi.TensorStep) -> None:
    """Make ``target`` the same, with memory of its own."""
    ctypes.memmove(ctypes.byref(target), ctypes.byref(source), _SIZE)
    if source.dims:
        count = 3 * source.dims
        target.layout = (abi.c_int64 * count)(*source.layout[:count])
    target.idle = 0


def dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order: then it can be read from end to end."""
    return x.is_contiguous() or _fills(x.shape, x.stride())


def is_dense(kind: tuple[Any, ...]) -> bool:
    """The same of a tensor of this kind (:func:`memopt.kernels.signature.kind_of`)."""
    _, _, _, shape, stride = kind
    return stride is None or _fills(shape, stride)


def _fills(shape: Sequence[int], strides: Sequence[int]) -> bool:
    filled = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != filled:
                return False
            filled *= size
    return True


__all__ = ["DTYPES", "copy", "dense", "describe_group", "describe_tensor", "flags", "is_dense", "needs_ranks", "refuse"]
