"""From a :class:`~memopt.engines.base.Work` to the descriptors that the kernels read, or the reason why not."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from memopt.formats.rowmean import span
from memopt.geometry import FLAT_ROW, Rows
from memopt.kernels import abi
from memopt.ledger import dtype_name
from memopt.masters import master_of
from memopt.rules import RULES, Moment
from memopt.rules.adafactor import FP32_EPS
from memopt.rules.lookahead import SLOW

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.engines.work import Work
    from memopt.formats import Format
    from memopt.spec import OptimSpec

DTYPES = {getattr(torch, name): code for name, code in abi.DTYPES.items()}
#: Rules whose weight decay multiplies the parameter.
DECOUPLED = ("adamw", "lion", "came", "ademamix", "adammini", "lamb", "stableadamw")
Moments = list[tuple[Moment, "Format", str]]


def describe_group(spec: OptimSpec, h: Mapping[str, Any]) -> abi.Group:
    """The hyperparameters of a group, as Python floats have them."""
    g = abi.Group()
    rule = RULES.parts(spec.rule)[1]
    g.rule = abi.RULES[rule]
    g.flags = flags(spec, h)
    g.lr = 0.0 if h["lr"] is None else float(h["lr"])
    g.weight_decay = h["weight_decay"]
    g.d = h.get("d", 1.0)
    g.momentum = h.get("momentum", 0.0)
    g.dampening = h.get("dampening", 0.0)
    betas = h.get("betas", ())
    g.beta1, g.beta2, g.beta3 = (*betas, 0.0, 0.0, 0.0)[:3]
    if rule == "adafactor":
        g.beta1, g.beta2 = h["beta1"] or 0.0, h["beta2_decay"]
    elif rule == "rmsprop":
        g.beta1 = g.beta2 = h["alpha"]
    elif rule == "adabound":
        g.final_lr, g.gamma, g.peak = h["final_lr"], h["gamma"], h["base_lr"] or 0.0
    elif rule == "ademamix":
        g.alpha, g.alpha_steps, g.beta3_steps = h["alpha"], h["t_alpha"] or 0, h["t_beta3"] or 0
    g.slow_steps, g.slow_rate = h.get("lookahead_steps", 0), h.get("lookahead_rate", 0.0)
    eps = h.get("eps", 0.0)
    first, second = eps if isinstance(eps, (tuple, list)) else (eps, 0.0)
    g.eps, g.eps2 = FP32_EPS if first is None else first, second
    return g


def flags(spec: OptimSpec, h: Mapping[str, Any]) -> int:
    rule = RULES.parts(spec.rule)[1]
    decoupled = rule in DECOUPLED or (rule == "radam" and h["decoupled_weight_decay"])
    momentum = h.get("momentum") or (rule == "adafactor" and h["beta1"] is not None)
    chosen = {
        abi.MAXIMIZE: h["maximize"],
        abi.AMSGRAD: h.get("amsgrad"),
        abi.DECOUPLED: decoupled,
        abi.NESTEROV: h.get("nesterov"),
        abi.CENTERED: h.get("centered"),
        abi.MOMENTUM: momentum,
        abi.TRANSFORMERS: h.get("convention") == "transformers",
        abi.SCALE_PARAMETER: h.get("scale_parameter"),
        abi.RELATIVE_STEP: h.get("relative_step"),
        abi.WARMUP_INIT: h.get("warmup_init"),
    }
    return sum(flag for flag, on in chosen.items() if on)


def format_of(moments: Moments) -> str:
    """The one format that the kernels are told: that of the moments which the rule does not hold in another."""
    names = {f.name for m, f, _ in moments if not m.held}
    return "factored" if "factored" in names else next(iter(names), "32bit")


def needs_ranks(spec: OptimSpec, moments: Moments, rows: Rows, world_size: int) -> str | None:
    """Which sums the ranks that share a parameter would have to exchange within a step, or None."""
    if cut := cuts_means(spec, moments, rows):
        return cut
    if world_size == 1:
        return None
    if takes_sums(spec, moments):
        return f"{spec.rule} needs sums over {world_size} ranks between the passes of a kernel"
    return None


def takes_sums(spec: OptimSpec, moments: Moments) -> bool:
    """Whether an update needs sums over rows that may be on several ranks."""
    return not RULES[spec.rule].element_wise or format_of(moments) == "factored"


def cuts_means(spec: OptimSpec, moments: Moments, rows: Rows) -> str | None:
    """Why a mean of some elements may have to be taken on two ranks, or None."""
    if rows.flat != FLAT_ROW and any(f.name == "rowmean" for _, f, _ in moments):  # one process alone has such rows too
        return f"{spec.rule} takes means of {FLAT_ROW} elements of a vector that may be cut between any two"
    return None


def refuse(spec: OptimSpec, moments: Moments, rows: Rows, p: Tensor, g: Tensor) -> str | None:
    """Why this parameter is stepped by the plain torch path, or None."""
    if not (p.is_cpu and g.is_cpu):
        return f"the kernels are for the CPU, and it is on {p.device}"
    if p.dtype not in DTYPES or g.dtype not in DTYPES:
        return f"the kernels take fp32, bf16 and fp16, and it is {str(p.dtype).removeprefix('torch.')}"
    wrapper, rule = RULES.parts(spec.rule)
    fmt = format_of(moments)
    known = wrapper in ("", "lookahead") and rule in abi.RULES and fmt in abi.FORMATS
    if not known or any(m.name not in (*abi.SLOT, SLOW.name) for m, _, _ in moments):
        return f"there is no kernel for {spec.rule} in {spec.format}"
    if spec.master not in abi.MASTERS:
        return f"there is no kernel for +{spec.master}"
    if p.dim() > 255:
        return f"the kernels take at most 255 dimensions, and it has {p.dim()}"
    if any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
        return "several of its elements lie in one place, which torch refuses to write"
    if master_of(spec, dtype_name(p)).dithered and (rows.flat != FLAT_ROW or (fmt == "factored" and p.dim() > 2)):
        return f"the random bits of +{spec.master} begin within a row of the kernels' view"
    return cuts_means(spec, moments, rows)


def describe(
    target: abi.TensorStep,
    spec: OptimSpec,
    work: Work,
    moments: Moments,
    group: int,
) -> str | None:
    """Fill ``target``; returns why the state cannot be used as it lies, or None."""
    rows, p, g = work.rows, work.p, work.g
    master = master_of(spec, dtype_name(p))
    fmt = format_of(moments)
    ctypes.memset(ctypes.byref(target), 0, ctypes.sizeof(target))  # of another work, that was given up half-way
    if not (p.is_contiguous() and g.is_contiguous()):
        numbers = [*p.shape, *p.stride(), *g.stride()]
        target.layout, target.dims = (abi.c_int64 * len(numbers))(*numbers), p.dim()
    target.p, target.g = p.data_ptr(), g.data_ptr()
    target.step, target.index, target.group = work.step, work.index & 0xFFFFFFFF, group
    target.format, target.p_dtype, target.g_dtype = abi.FORMATS[fmt], DTYPES[p.dtype], DTYPES[g.dtype]
    target.numel, target.whole_numel = p.numel(), Rows.whole(rows.shape).numel
    target.first_row = rows.first
    target.cut = takes_sums(spec, moments) and (spec.partition != "none" or bool(work.groups))
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
        kept = work.state[master.key]
        if not (kept.is_cpu and kept.is_contiguous()):
            return f"its {master.key} is not a contiguous tensor in host memory"
        target.kept = kept.data_ptr()
    for order, (moment, held, _) in enumerate(moments):
        parts = list(held.layout(moment, rows))
        tensors = [work.state[f"{moment.name}.{part}" if part else moment.name] for part in parts]
        for part in tensors:
            if not (part.is_cpu and part.is_contiguous()):
                return f"its {moment.name} is not a contiguous tensor in host memory"
        if moment is SLOW:
            target.slow = tensors[0].data_ptr()
            continue
        if held.name == "rowmean":
            target.span = span(rows)
        slot = abi.SLOT[moment.name]
        target.order[slot] = order
        target.data[slot] = tensors[0].data_ptr()
        target.aux[slot] = tensors[1].data_ptr() if len(tensors) > 1 else None
    return None


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
