"""flashoptim's Adam, AdamW, SGD and Lion: companded 8-bit codes, and weights of 24 or 32 bits in two parts.

Moments are :class:`~memopt.formats.foreign.flashoptim.Companded`. Beside a 16-bit weight p stands a correction c of 8
or 16 bits: the weight is p + c u, u being half a unit in the last place of p over 127 or 32767.

torch casts the tensors of a state_dict to the parameter's dtype: fp16 scales beside bf16 weights and corrections of 16
bits are the same bytes under the parameter's dtype; corrections of 8 bits are numbers in it. Uncompressed dictionaries
have ordinary moments. Source: FlashOptim, Databricks 2026; flashoptim/optimizers.py of flashoptim 0.1.4.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from memopt.checkpoint.conversion.master_weights import Raw
from memopt.checkpoint.importers.base import Tool, ToolState, encoded, plain
from memopt.checkpoint.state.saved import LivePiece, SavedMaster, Stored
from memopt.core.rows import Rows
from memopt.formats.base import Shard
from memopt.formats.foreign.flashoptim import BLOCK, Companded
from memopt.masters import Master
from memopt.rules import Moment

COMPANDED = Companded(BLOCK)
CODES, SCALES = "::quantized", "::scales"
CORRECTION = "error_bits"
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
#: Of 16-bit floats: bits of the mantissa, and the smallest exponent of a normal number.
_FLOATS = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}


def rules(group: ToolState, state: ToolState) -> tuple[str, ...]:
    """It does not save whether weight decay is decoupled."""
    if "eps" in group:
        return ("adamw", "adam")
    if "momentum" not in group:
        return ("lion",)
    return ("sgd", "sgdw") if group["weight_decay"] else ("sgd",)


def hyper(group: ToolState, rule: str) -> dict[str, Any]:
    keys = ("lr", "betas", "eps", "momentum", "dampening", "weight_decay")
    return {key: group[key] for key in keys if key in group}


def moments(state: ToolState) -> dict[str, Stored]:
    found = {}
    for name in _MOMENTS:
        if name + CODES in state:
            found[name] = _companded(name, state[name + CODES], state[name + SCALES])
        elif name in state:
            found[name] = plain(name, state[name])
    return found


def _companded(name: str, codes: Tensor, scales: Tensor) -> Stored:
    if scales.numel() != -(-codes.numel() // BLOCK):
        raise ValueError(f"this flashoptim state of {name} is not in blocks of {BLOCK}")
    scales = scales.view(torch.float16) if scales.dtype == torch.bfloat16 else scales
    return encoded(name, COMPANDED, tuple(codes.shape), {"codes": codes, "scales": scales})


@final
class _Correction(Master):
    """The two parts of a weight at rest: it is read and kept, and nothing is trained with it."""

    name = "flashoptim"
    summary = "flashoptim's correction"
    key = "correction"

    def __init__(self, nbits: int) -> None:
        self._nbits = nbits

    def stored_dtype(self, dtype: str) -> str:
        return dtype

    def read(self, p: Tensor, stored: Tensor | None) -> Tensor:
        assert stored is not None
        share = stored.float() if self._nbits == 8 else stored.contiguous().view(torch.int16).float()
        share.div_(2 ** (self._nbits - 1) - 1)
        return p.float() + torch.ldexp(share.double(), _half_a_unit(p)).float()

    def foreign(self, p: Tensor, stored: Tensor) -> Tensor:
        return torch.zeros_like(p, dtype=torch.bool)

    def keep(self, x: Tensor, p: Tensor, stored: Tensor | None) -> None:
        assert stored is not None
        share = torch.ldexp(x.double() - p.double(), -_half_a_unit(p)).clamp_(-1, 1)
        whole = share.mul_(2 ** (self._nbits - 1) - 1).round_()
        stored.copy_(whole.to(torch.int8) if self._nbits == 8 else whole.to(torch.int16).view(p.dtype))

    def write(self, x: Tensor, p: Tensor, stored: Tensor | None, shard: Shard) -> None:
        raise NotImplementedError("nothing is trained with flashoptim's corrections here")


def _half_a_unit(p: Tensor) -> Tensor:
    """The exponent of half a unit in the last place of ``p``, int32."""
    mantissa, smallest = _FLOATS[p.dtype]
    exponent = (torch.frexp(p.float())[1] - 1).clamp_(min=smallest)
    return torch.where(p == 0, smallest, exponent) - mantissa - 1


#: Bytes of a weight with its correction -> the correction.
CORRECTIONS = {3: _Correction(8), 4: _Correction(16)}


def master_weights(group: ToolState, state: ToolState) -> SavedMaster | None:
    correction = state.get(CORRECTION)
    if correction is None:
        return None
    dtype = str(correction.dtype).removeprefix("torch.")
    if correction.dtype not in _FLOATS or group["master_bytewidth"] not in CORRECTIONS:
        raise ValueError(
            f"this flashoptim state has {CORRECTION} of {dtype} for weights of "
            f"{group['master_bytewidth']} bytes, which is not known here"
        )
    shape = tuple(correction.shape)
    piece = LivePiece(Rows.whole(shape), {"": correction})
    master = CORRECTIONS[group["master_bytewidth"]]
    return SavedMaster(master, dtype, Stored(Moment(master.key), Raw(dtype), shape, (piece,)))


TOOL = Tool(
    name="flashoptim",
    wrote=lambda group, state: "master_bytewidth" in group,
    rules=rules,
    hyper=hyper,
    moments=moments,
    # SGD and Lion do not count their steps; that there is a moment says that one was taken.
    step=lambda state: float(state.get("step", 1)),
    unsaved=("nesterov",),
    master=master_weights,
)
