"""What Python does not pass on of the C library: ``mmap`` without a descriptor held open, ``madvise``,
``fallocate``."""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache
from typing import Any


@lru_cache
def libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if hasattr(libc, "fallocate"):
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    return libc


def advise(address: int, nbytes: int, advice: int) -> bool:
    """Tell the system about the whole pages of a range; False where it does not understand."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return end <= begin or libc().madvise(begin, end - begin, advice) == 0
