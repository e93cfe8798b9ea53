"""From parameters and their state to the tables that the kernels read: built once, on the host, then on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from memopt.core import dither
from memopt.core.rows import FLAT_ROW, Rows
from memopt.formats import int4
from memopt.formats.rowmean import span
from memopt.kernels import abi, pack
from memopt.kernels.triton.available import missing
from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.device import masters, row_means
from memopt.kernels.triton.device.bands import HEIGHT
from memopt.kernels.triton.device.codes import KINDS
from memopt.kernels.triton.scalars import NUMBER
from memopt.masters.base import ORDER
from memopt.rules.lookahead import SLOW

if TYPE_CHECKING:
    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work
    from memopt.rules import Rule

#: dtype -> Triton's name of it.
TYPES: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
#: Bytes: vector loads want addresses and rows that begin at multiples of this.
VECTOR = 16
#: A program takes so many elements, more where there would be more programs than the second number (of a bucket).
PROGRAM, PROGRAMS = 8192, 2**17
WARPS = 4
#: Additions and multiplications are fused where the source says so, as in the C++ kernels.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
#: Entries that a program of the small kernels takes at a time.
SPAN = 256
#: Columns and rows of a tile of a factored moment, and the width up to which the narrow one is taken.
WIDE, NARROW = (512, 4), (64, 32)
#: Bytes of the sums of bands that are kept at a time.
WORKSPACE = 32 * 2**20
#: Rates that may be tensors on the device, and their columns of ``hyper``.
RATES = {"lr": f.LR.value}


class Bucket(NamedTuple):
    """What is compiled for: tensors of one bucket are stepped by one launch."""

    p_type: torch.dtype
    g_type: torch.dtype
    kinds: tuple[str, str, str]  # the formats of V, M and X
    slots: tuple[bool, bool, bool]  # which of them are kept element by element
    x_signed: bool
    means: int  # a kind of row_means.py
    residual: bool  # CAME's, factored
    align: int
    whole: bool
    width: int
    band: int  # columns of a band of a factored moment; 0 without one
    master: str

    @property
    def factored(self) -> bool:
        """Whether bands are all that a step goes by."""
        return self.band > 0 and self.means == row_means.NONE.value

    @property
    def precise(self) -> bool:
        return set(self.kinds) <= {"32bit", "bf16", "factored"}

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels over elements are compiled for."""
        v, m, x = (KINDS.get(kind, KINDS["32bit"]) for kind in self.kinds)
        return {
            "P_TYPE": TYPES[self.p_type],
            "G_TYPE": TYPES[self.g_type],
            **self.master_constants,
            "V_KIND": v,
            "M_KIND": m,
            "X_KIND": x,
            "HALVES": "4bit" in self.kinds,
            "MEANS": self.means,
            "WIDTH": self.width,
            "TILE": self.tile,
            "ALIGN": self.align,
            "WHOLE": self.whole,
            "PRECISE": self.precise,
            "num_warps": WARPS,
        }

    @property
    def master_constants(self) -> dict[str, Any]:
        dtype = TYPES[self.p_type] if self.master == "kahan" else masters.TYPES[self.master]
        return {"MASTER": masters.KINDS[self.master], "K_TYPE": dtype}

    @property
    def tile(self) -> int:
        """Blocks of one tile."""
        elements = 4 if self.p_type.itemsize == 4 and self.precise else 8
        return max(WARPS * 32 * elements // self.width, 1)


def refuse(layout: ParamLayout, p: Tensor, world_size: int) -> str | None:
    """Why this parameter cannot be stepped by the kernels, or None."""
    reason = missing(p.device.type)
    if reason:
        return reason
    if p.dtype not in TYPES:
        return f"the kernels take fp32, bf16 and fp16, and it is {str(p.dtype).removeprefix('torch.')}"
    rule = layout.rule
    if layout.modifiers:
        return f"there is no kernel for {rule.name} with {', '.join(layout.modifiers)}"
    supported = rule.wrapper in ("", "lookahead") and rule.inner in NUMBER
    supported = supported and pack.formats_of(layout) <= {*KINDS, "factored"}
    if not supported or any(m.moment.name not in (*abi.SLOT, SLOW.name) for m in layout.moments):
        return f"there is no kernel for {rule.name} in {layout.asked}"
    if layout.master.name not in masters.KINDS:
        return f"there is no Triton kernel for +{layout.master.name}"
    if not p.is_contiguous():
        return "it is not contiguous"
    if layout.rows.may_cut and layout.master.name in masters.DITHERED:
        return f"the random bits of +{layout.master.name} begin within a row of the kernels' view"
    return pack.needs_ranks(layout, world_size)


def rates_on_device(h: Mapping[str, Any]) -> list[str]:
    """The rates of a param group that the host does not know."""
    return [key for key in RATES if isinstance(h.get(key), Tensor) and h[key].device.type != "cpu"]


def hyper_row(rule: Rule, h: Mapping[str, Any], scale: float = 1.0, bound: float | None = None) -> list[float]:
    """A row of ``hyper``; rates on the device are 0 here and copied there. Gradients are multiplied by ``scale``, and
    clipped where their norm is above ``bound``."""
    group = pack.describe_group(rule, {**h, **dict.fromkeys(rates_on_device(h), 0.0)})
    flags = group.flags
    torch_adafactor = rule.inner == "adafactor" and not flags & abi.TRANSFORMERS
    row = [getattr(group, name) for name in abi.HYPER]
    row += [float(bool(flags & abi.MAXIMIZE)), float(bool(flags & abi.DECOUPLED or torch_adafactor))]
    for flag in (abi.NESTEROV, abi.TRANSFORMERS, abi.SCALE_PARAMETER, abi.RELATIVE_STEP, abi.WARMUP_INIT):
        row.append(float(bool(flags & flag)))
    row += [scale, inf if bound is None else bound]
    return row + [0.0] * (f.HYPER.value - len(row))


def division(divisor: int) -> tuple[int, int]:
    """``(magic, shift)`` with n // divisor == (2 n * magic >> 32) >> shift for 0 <= n < 2^31.

    >>> magic, shift = division(7)
    >>> all(n // 7 == (2 * n * magic >> 32) >> shift for n in (0, 6, 7, 48, 49, 2**31 - 1, 2**31 - 2, 7**10 - 1))
    True
    """
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor), shift


class Tensors:
    """Static rows of one tensor: its bucket and its columns of ``table``."""

    def __init__(self, work: Work, seed: int, group: int, counter: int) -> None:
        layout, p, rows = work.layout, work.p, work.rows
        names = pack.formats_of(layout)
        # In bands alone go moments whose lines are no blocks.
        bands = "factored" in names and names <= {"factored", "32bit"}
        row = [0] * f.FIELDS.value
        slots, x_signed, addresses = [False] * abi.SLOTS, False, [p.data_ptr(), work.g.data_ptr()]
        kinds = ["32bit"] * abi.SLOTS
        means = row_means.NONE.value
        if "factored" in names and not bands:
            lines = len(rows.shape) > 2 or rows.unit > 1  # lines of a matrix are not rows
            means = (row_means.FACTORS_OF_STACK if lines else row_means.FACTORS).value
        for order, (moment, fmt, _, keys) in enumerate(layout.moments):
            parts = [work.state[key] for _, key in keys]
            if moment is SLOW:
                row[f.SLOW.value] = parts[0].data_ptr()
                addresses.append(row[f.SLOW.value])
                continue
            slot = abi.SLOT[moment.name]
            if fmt.name == "rowmean":
                row[f.DATA0.value] = parts[0].data_ptr()
                means = (row_means.ONE if span(rows) == rows.in_units(FLAT_ROW).cols else row_means.SEVERAL).value
                continue
            kinds[slot] = fmt.name
            slots[slot] = bands or fmt.name != "factored"
            x_signed = x_signed or (slot == 2 and moment.signed)
            row[f.DATA0.value + slot] = parts[0].data_ptr()
            row[f.AUX0.value + slot] = parts[1].data_ptr() if len(parts) > 1 else 0
            row[f.KEY0.value + slot] = dither.key(seed, work.index, order)
            addresses.append(parts[0].data_ptr())
        master = layout.master
        row[f.BESIDE_KEY.value] = dither.key(seed, work.index, ORDER)
        if master.key in work.state:
            row[f.BESIDE.value] = work.state[master.key].data_ptr()
            addresses.append(row[f.BESIDE.value])
        # Without blocks and random bits it does not matter where rows begin.
        anywhere = names <= {"32bit"} and master.name not in masters.DITHERED and means == row_means.NONE.value
        flat = len(rows.shape) < 2 or anywhere
        width, cols, count = geometry(names, rows, p, flat)
        line, band = cols, 0
        if "factored" in names:
            line = rows.local_shape[-1]
            band = WIDE[0] if line > NARROW[0] else NARROW[0]
            if bands:
                width, cols, count = band, line, p.numel() // max(line, 1)
        per_row = max(-(-cols // width), 1)
        numel = p.numel()
        row[f.P.value], row[f.NUMEL.value], row[f.COLS.value] = p.data_ptr(), numel, cols
        row[f.PER_ROW.value] = per_row
        row[f.MAGIC.value], row[f.SHIFT.value] = division(per_row)
        row[f.FIRST_ROW.value] = rows.first
        row[f.GROUP.value], row[f.STEP.value] = group, counter
        row[f.BLOCKS.value] = -(-numel // width) if flat else count * per_row
        #: Elements by which rows begin, in units of which a vector of the smallest code is still aligned.
        step = VECTOR * 2 if "4bit" in names else VECTOR
        aligned = all(a % VECTOR == 0 for a in addresses) and numel % step == 0 and (flat or cols % step == 0)
        if means in (row_means.ONE.value, row_means.SEVERAL.value):
            row[f.ROW_SPAN.value] = max(span(rows), 1)
            row[f.ROW_GROUP.value] = rows_together(numel, row[f.ROW_SPAN.value])
        if band:
            row[f.HEIGHT.value], row[f.LINE.value] = rows.local_shape[-2], line
            row[f.STACKED.value] = len(rows.shape) > 2
            row[f.LINES.value] = max(rows.cols // max(line, 1), 1)
        self.row = row  # how it is cut and where its sums are is added by the launcher
        self.blocks = row[f.BLOCKS.value]
        whole = numel % width == 0 and (flat or cols % width == 0)
        self.bucket = Bucket(
            p.dtype,
            work.g.dtype,
            (kinds[0], kinds[1], kinds[2]),
            (slots[0], slots[1], slots[2]),
            x_signed,
            means,
            kinds[2] == "factored",
            VECTOR if aligned and line % VECTOR == 0 else 1,
            whole and not bands,
            width,
            band,
            master.name,
        )

    def copy(self) -> Tensors:
        """The same, for another launcher."""
        twin = copy(self)
        twin.row = list(self.row)
        return twin


def geometry(names: set[str], rows: Rows, p: Tensor, flat: bool) -> tuple[int, int, int]:
    """Columns of a tile, which is as wide as the widest block, of a row, and how many rows."""
    width = FLAT_ROW if names & {"8bit", "fp8"} or "4bit" not in names else int4.CODE.block
    if flat:
        return width, FLAT_ROW, -(-p.numel() // FLAT_ROW)
    return width, rows.cols, rows.count


def programs(tensors: Sequence[int], pieces: Sequence[int], piece: int) -> Tensor:
    """int32 [programs, 2]: of each tensor, its number and the first of every ``piece`` pieces it has."""
    counts = torch.tensor([-(-n // piece) for n in pieces], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.tensor(tensors, dtype=torch.int64), counts)
    before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    first = (torch.arange(len(owner)) - before) * piece
    return torch.stack((owner, first), 1).to(torch.int32).contiguous()


def pieces_of_programs(total: int, tile: int, width: int) -> int:
    """Tiles that one program takes when there are ``total`` blocks."""
    run = max(PROGRAM // (tile * width), 1)
    while total > PROGRAMS * run * tile:
        run *= 2
    return run


def rows_together(numel: int, span: int) -> int:
    """Row means that one program renews."""
    group = max(PROGRAM // span, 1)
    while numel > PROGRAMS * group * span:
        group *= 2
    return group


def bands(row: Sequence[int], width: int) -> tuple[int, int, int]:
    """Matrices of a factored tensor, bands along its rows' direction and along its columns'."""
    numel, cols, height = row[f.NUMEL.value], row[f.LINE.value], row[f.HEIGHT.value]
    return numel // (cols * height), -(-height // HEIGHT.value), -(-cols // width)


__all__ = ["Bucket", "Tensors", "bands", "hyper_row", "pieces_of_programs", "programs", "refuse"]
