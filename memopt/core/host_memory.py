"""The memory of a tensor as bytes, without numpy, which torch does not ask for."""

from __future__ import annotations

from ctypes import c_char
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def bytes_view(buffer: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the host, which lives as long as the view; both see what is written.

    >>> import torch
    >>> x = torch.zeros(4, dtype=torch.uint8)
    >>> bytes_view(x)[1:3] = b"ab"
    >>> x.tolist()
    [0, 97, 98, 0]
    """
    if not buffer.numel():
        return memoryview(bytearray())
    memory: Any = (c_char * buffer.numel()).from_address(buffer.data_ptr())
    memory.tensor = buffer
    return memoryview(memory).cast("B")
