"""``paged``: memory that can be paged out under pressure."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, final

from memopt.ledger import Line
from memopt.placements.base import Placement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Parts of one arena begin at multiples of this, for vector loads.
ALIGNMENT = 64


@final
class Paged(Placement):
    """On a CPU: one file per parameter, mapped into memory and already unlinked, in the directory for temporary
    files (``TMPDIR``). The operating system writes pages back to it when memory is short and reads them again when a
    step touches them; anonymous memory could only go to swap, which most machines do not have. On CUDA: unified
    memory from bitsandbytes' allocator, which the driver moves to the host when the card is full (written for CUDA,
    not yet run on a GPU).

    All parts are paged, scales included, whatever their size (bitsandbytes pages buffers from 1e5 elements on, and
    never its absmax). Where ``TMPDIR`` is a file system in memory nothing can be written back: that is an error, not
    a silent fallback.
    """

    name = "paged"
    summary = "paged out under pressure: unified memory on CUDA, a mapped file on the CPU"

    def location(self, device: str) -> str:
        return f"paged:{device}"

    def allocate(self, lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
        if device.type == "cuda":
            return _unified(lines, device)
        if device.type == "cpu":
            return _mapped(lines)
        raise RuntimeError(f"paged: no pageable memory is known for device {device}; use the placement 'device'")

    def explain(self, device: torch.device) -> str:
        if device.type == "cuda":
            return f"state is in CUDA unified memory, paged between {device} and the host by the driver"
        import tempfile

        return f"state is in unlinked files mapped into memory from {tempfile.gettempdir()}, paged by the system"


def _mapped(lines: Sequence[Line]) -> dict[str, Tensor]:
    """Views into one mapped file that has no name any more; the mapping ends with the last view."""
    import torch

    offsets, end = [], 0
    for line in lines:
        offsets.append(end)
        end += -(-line.nbytes // ALIGNMENT) * ALIGNMENT
    if not end:
        return {line.key: torch.zeros(line.shape, dtype=getattr(torch, line.dtype)) for line in lines}
    import tempfile

    directory = tempfile.gettempdir()
    _refuse_memory_file_system(directory)
    handle, path = tempfile.mkstemp(prefix="memopt-", suffix=".state")
    try:
        # Reserve the blocks now: a full disk is an error here, not a signal in the middle of a step.
        os.posix_fallocate(handle, 0, end)
        arena = mmap.mmap(handle, end)
    except OSError as error:
        raise OSError(error.errno, f"paged: cannot reserve {end:,} bytes in {directory}: {error.strerror}; "
                                   "set TMPDIR to a directory on a disk with room") from error  # fmt: skip
    finally:
        os.close(handle)
        os.unlink(path)
    tensors = {}
    for line, offset in zip(lines, offsets, strict=True):
        dtype, numel = getattr(torch, line.dtype), prod(line.shape)
        if numel:
            # A storage of its own for each part: torch.save refuses one storage seen as two dtypes.
            tensors[line.key] = torch.frombuffer(arena, dtype=dtype, count=numel, offset=offset).view(line.shape)
        else:
            tensors[line.key] = torch.zeros(line.shape, dtype=dtype)
    return tensors


@lru_cache
def _refuse_memory_file_system(directory: str) -> None:
    import psutil

    path = os.path.realpath(directory)
    mounts = [m for m in psutil.disk_partitions(all=True) if path == m.mountpoint or
              path.startswith(m.mountpoint.rstrip("/") + "/")]  # fmt: skip
    mount = max(mounts, key=lambda m: len(m.mountpoint), default=None)
    if mount is not None and mount.fstype in ("tmpfs", "ramfs"):
        raise RuntimeError(f"paged: {directory} is {mount.fstype}, which is memory itself, so nothing could be paged "
                           "out; set TMPDIR to a directory on a disk")  # fmt: skip


class _Managed:
    """Unified memory as the CUDA array interface describes it, so that torch sees an ordinary CUDA tensor."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "strides": None, "version": 3,
        }  # fmt: skip


def _unified(lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
    """Not yet run on a GPU. bitsandbytes' own paged tensors call themselves CPU tensors; these say where they step."""
    import ctypes

    import torch

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
