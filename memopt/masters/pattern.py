"""fp32 magnitudes as integers whose upper bits are a 16-bit float: rounding becomes integer arithmetic.

A bf16 number is the upper half of an fp32 number. An fp16 number has another exponent; times 2^-112 (the difference
of the exponents' biases) an fp32 number has fp16's, and all but its 13 last bits are fp16's bits, subnormals included.
So for both, with s = 16 or 13: ``pattern >> s`` is the magnitude of the 16-bit number below, and the s bits that are
cut off say how far x is on the way to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SHIFT = {"torch.bfloat16": 16, "torch.float16": 13}
_BIAS = {"torch.bfloat16": 1.0, "torch.float16": 2.0**-112}
#: The least magnitude that has no pattern: infinity; in fp16 the first power of two that is.
_LIMIT = {"torch.bfloat16": float("inf"), "torch.float16": 65536.0}


def shift_of(dtype: torch.dtype) -> int:
    """Bits of the pattern below the last bit of the 16-bit number."""
    return _SHIFT[str(dtype)]


def to_pattern(x: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 >= 0 [x.shape] of fp32 x; 0 for what has no pattern (NaN, infinities, beyond fp16's range)."""
    import torch

    size = x.abs()
    return torch.where(size < _LIMIT[str(dtype)], size.mul(_BIAS[str(dtype)]), 0.0).view(torch.int32)


def from_pattern(pattern: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 of the patterns, with the signs of ``x``; ``x`` itself where it has no pattern."""
    import torch

    value = pattern.view(torch.float32).div(_BIAS[str(dtype)]).copysign_(x)
    return torch.where(x.abs() < _LIMIT[str(dtype)], value, x)
