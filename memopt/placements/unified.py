"""CUDA unified memory, by bitsandbytes' allocator. Not yet run on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from memopt.ledger import Line


class _Managed:
    """Unified memory as the CUDA array interface describes it, so that torch sees an ordinary CUDA tensor."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "strides": None, "version": 3,
        }  # fmt: skip


def unified(lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
    """bitsandbytes' own paged tensors call themselves CPU tensors; these say where they step."""
    from memopt.engines.bitsandbytes import require

    require()
    from bitsandbytes.cextension import lib

    tensors = {}
    for line in lines:
        dtype = getattr(torch, line.dtype)
        if line.nbytes:
            with torch.cuda.device(device):
                pointer = lib.cget_managed_ptr(ctypes.c_size_t(line.nbytes))
            raw = torch.as_tensor(_Managed(pointer, line.nbytes), device=device)
            tensors[line.key] = raw.zero_().view(dtype).view(line.shape)
        else:
            tensors[line.key] = torch.zeros(line.shape, dtype=dtype, device=device)
    return tensors
