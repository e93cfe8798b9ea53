"""CUDA unified memory, by bitsandbytes' allocator, and its prefetch. Not yet run on a GPU.

The allocator has no counterpart that frees: unified memory is given back when the process ends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.core.extras import require
from memopt.core.ledger import Line
from memopt.placements.workspaces import AHEAD

if TYPE_CHECKING:
    from memopt.layout.param_step import Work


class _Managed:
    """Unified memory as the CUDA array interface describes it, so that torch sees an ordinary CUDA tensor."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def unified(lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
    """bitsandbytes' own paged tensors call themselves CPU tensors; these say where they step."""
    lib = _library()
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


def fetched(works: Sequence[Work]) -> Iterator[list[Work]]:
    """These works in order, a few at a time, each few after their state was asked to the card (a request on the default
    stream, before which their kernels do not begin)."""
    few: list[Work] = []
    nbytes = 0
    for work in works:
        size = sum(work.state[key].nbytes for key in work.layout.tensors)
        if few and nbytes + size > AHEAD:
            _prefetch(few)
            yield few
            few, nbytes = [], 0
        few.append(work)
        nbytes += size
    if few:
        _prefetch(few)
        yield few


def _prefetch(works: Sequence[Work]) -> None:
    lib = _library()
    for work in works:
        for t in (work.state[key] for key in work.layout.tensors):
            if t.is_cuda and t.nbytes:
                lib.cprefetch(ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(t.nbytes), ctypes.c_int32(t.device.index))


def _library() -> Any:
    return require("bitsandbytes.cextension", "@paged on CUDA").lib
