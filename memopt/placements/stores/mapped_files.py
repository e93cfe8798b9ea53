"""Files in memory and what the system may be told about them: ``mmap``, ``madvise`` and ``fallocate`` of the C library.

Python's own ``mmap`` keeps a file descriptor open for each mapping; a model has more parameters than a process may
have descriptors.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from math import prod
from typing import TYPE_CHECKING, Any

from memopt.core.libc import libc

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.chunks import Part

_PROT_READ_WRITE, _MAP_SHARED = 3, 1
DONT_NEED = 4
_KEEP_SIZE_AND_PUNCH_HOLE = 3


def map_file(descriptor: int, offset: int, nbytes: int) -> Any:
    """Bytes of a file as memory that is shared with it, unmapped when nothing refers to it any more."""
    address = libc().mmap(None, nbytes, _PROT_READ_WRITE, _MAP_SHARED, descriptor, offset)
    if address in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {nbytes:,} bytes of a file: {os.strerror(number)}")
    buffer = (ctypes.c_char * nbytes).from_address(address)
    # At the end of the process the system unmaps, after the last tensor.
    weakref.finalize(buffer, libc().munmap, address, nbytes).atexit = False
    return buffer


def tensors_in(buffer: Any, parts: list[Part]) -> dict[str, Tensor]:
    """A tensor for each part, at its offset. A storage of its own for each: torch.save refuses one storage seen as two
    dtypes."""
    import torch

    found = {}
    for part in parts:
        dtype, numel = getattr(torch, part.dtype), prod(part.shape)
        if numel:
            found[part.key] = torch.frombuffer(buffer, dtype=dtype, count=numel, offset=part.offset).view(part.shape)
        else:
            found[part.key] = torch.zeros(part.shape, dtype=dtype)
    return found


def punch(descriptor: int, offset: int, nbytes: int) -> bool:
    """Give the blocks of a range back to the file system; the range reads as zeros. False where that cannot be done."""
    if sys.platform != "linux" or not nbytes:
        return not nbytes
    return bool(libc().fallocate(descriptor, _KEEP_SIZE_AND_PUNCH_HOLE, offset, nbytes) == 0)
