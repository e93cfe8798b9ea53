"""A number from the bits of a tensor, made where the tensor is: two that differ tell two tensors apart.

Each element's bits, widened to 64, are mixed with a constant of the element's place; the sums (modulo 2^64) over
``WIDTH`` elements are mixed and summed in the same way, until one number is left::

    z = (bits(x[i]) xor c[i mod WIDTH]) * M;   z = z xor (z >> 32);   sum over i of z

``AT_ONCE`` elements are widened at once, which bounds what this allocates (:func:`memopt.placements.cpu.looking`).
A single element that differs always shows. Of tensors that differ in several, which are none that were made to
deceive, about one pair in 2^64 has the same number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.placements.workspaces import AT_ONCE, WIDTH

#: Odd, so that to multiply by it loses nothing; as a signed number (Steele, Lea, Flood, "Fast splittable pseudorandom
#: number generators", OOPSLA 2014).
M = 0xBF58476D1CE4E5B9 - 2**64
_STEP = 0x9E3779B97F4A7C15 - 2**64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(x: Tensor) -> Tensor:
    """``x`` [...], contiguous, of any dtype of 1 to 8 bytes and at least one element -> int64 []."""
    flat = x.reshape(-1).view(_BITS[x.itemsize])
    constants = _mix(torch.arange(1, min(len(flat), WIDTH) + 1, device=x.device) * _STEP)
    while True:
        flat = torch.cat([_sums(some, constants) for some in flat.split(AT_ONCE)])
        if len(flat) == 1:
            return flat[0]


def _sums(x: Tensor, constants: Tensor) -> Tensor:
    """[n] -> int64 [ceil(n / WIDTH)]"""
    whole = len(x) // WIDTH * WIDTH
    found = []
    if whole:
        found.append(_mix(x[:whole].view(-1, WIDTH).to(torch.int64, copy=True).bitwise_xor_(constants)).sum(1))
    if len(x) > whole:
        last = x[whole:].to(torch.int64, copy=True)
        found.append(_mix(last.bitwise_xor_(constants[: len(last)])).sum(0, keepdim=True))
    return torch.cat(found)


def _mix(z: Tensor) -> Tensor:
    """In place."""
    z *= M
    high = z >> 32
    high &= 0xFFFFFFFF  # torch's shift brings the sign along
    z ^= high
    return z
