"""Tensors in an unnamed file, mapped: the system writes them out where memory is wanted."""

from __future__ import annotations

import mmap
import os
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from memopt.core.ledger import ITEMSIZE
from memopt.core.rows import Shape


class Scratch:
    """A file in ``folder`` that has no name and is gone with the tensors in it."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed in __exit__
        self._end = 0

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def zeros(self, dtype: str, shape: Shape) -> Tensor:
        kind = getattr(torch, dtype)
        nbytes = prod(shape) * ITEMSIZE[dtype]
        if nbytes < mmap.PAGESIZE:
            return torch.zeros(shape, dtype=kind)
        begin = self._end
        self._end += -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.posix_fallocate(self._file.fileno(), begin, nbytes)  # a full disk is an OSError here, and a signal later
        return torch.frombuffer(mmap.mmap(self._file.fileno(), nbytes, offset=begin), dtype=kind).view(shape)
