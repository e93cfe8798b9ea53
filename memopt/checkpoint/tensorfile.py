"""safetensors files read a piece at a time; :mod:`memopt.checkpoint.io.safetensors_write` writes them.

The format is safetensors' own (any tool that knows it reads the files); the code is ours because its library wants
every tensor in memory to write, and maps the file to read: where the file is cut short under a mapping the process
dies of a signal, which no ``except`` sees. Here bytes go straight between the file and the tensor's memory.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from memopt.core.host_memory import bytes_view
from memopt.core.ledger import ITEMSIZE, TensorSpec
from memopt.untrusted import Refused
from memopt.untrusted.headers import read_header
from memopt.untrusted.opening import open_regular
from memopt.untrusted.text import shown

#: safetensors' names of dtypes.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
CODES = {name: code for code, name in DTYPES.items()}
ITEMSIZES = {**ITEMSIZE, "bool": 1}

#: Bytes with a checksum of their own: damage is named to this accuracy.
CHUNK_NBYTES = 16 * 2**20
#: Bytes that go through a buffer at a time.
BUFFER_NBYTES = 4 * 2**20

#: ``progress(nbytes)``: so many more bytes are done.
Progress = Callable[[int], None]


class FileInfo(NamedTuple):
    """What the manifest says of a file: its size, and the CRC-32 of each ``CHUNK_NBYTES`` of it."""

    nbytes: int
    crc32: list[str]


class DamagedFile(Refused):
    """A file is not what was written; the message names it."""


def nbytes_of(spec: TensorSpec) -> int:
    return prod(spec.shape) * ITEMSIZES[spec.dtype]


def spec_of(tensor: Tensor) -> TensorSpec:
    """Raises ValueError for a dtype that the files have no name for."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in CODES:
        raise ValueError(f"a tensor of dtype {dtype} cannot be saved; the dtypes are {', '.join(CODES)}")
    return TensorSpec(dtype, tuple(tensor.shape))


def checksums(path: Path, progress: Progress = lambda nbytes: None) -> Iterator[str]:
    """The CRC-32 of each chunk of a file, as eight hexadecimal digits."""
    buffer = memoryview(bytearray(BUFFER_NBYTES))
    crc = done = 0
    with open_regular(path) as file:
        while count := file.readinto(buffer[: min(BUFFER_NBYTES, CHUNK_NBYTES - done)]):
            crc = zlib.crc32(buffer[:count], crc)
            done += count
            progress(count)
            if done == CHUNK_NBYTES:
                yield f"{crc:08x}"
                crc = done = 0
    if done:
        yield f"{crc:08x}"


def verify_file(path: Path, info: FileInfo, progress: Progress = lambda nbytes: None) -> None:
    """Raise :class:`DamagedFile` unless every byte is the one that was written."""
    if not path.exists():
        raise DamagedFile(f"{path} is missing")
    nbytes = path.stat().st_size
    if nbytes != info.nbytes:
        state = "truncated" if nbytes < info.nbytes else "too long"
        raise DamagedFile(f"{path} is {state}: it has {nbytes:,} bytes, and {info.nbytes:,} were written")
    if len(info.crc32) != -(-nbytes // CHUNK_NBYTES):
        raise DamagedFile(f"{path} has {nbytes:,} bytes, and {len(info.crc32):,} checksums were written")
    for i, (found, expected) in enumerate(zip(checksums(path, progress), info.crc32, strict=True)):
        if found != expected:
            first, last = i * CHUNK_NBYTES, min((i + 1) * CHUNK_NBYTES, nbytes) - 1
            raise DamagedFile(
                f"{path} is damaged between bytes {first:,} and {last:,}: its checksum is {found}, "
                f"and {expected} was written"
            )


class TensorFile:
    """A safetensors file open for reading. Raises :class:`DamagedFile` for a header that cannot be true."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)  # it stays open as long as the object
        try:
            self.specs, self._offsets = self._header()
        except Refused as error:
            self._file.close()
            raise DamagedFile(str(error)) from None

    def close(self) -> None:
        self._file.close()

    def _header(self) -> tuple[dict[str, TensorSpec], dict[str, int]]:
        specs, offsets = {}, {}
        for name, tensor in read_header(self._file, str(self.path)).items():
            if tensor.dtype not in DTYPES:
                raise Refused(f"{self.path}: {shown(name)} has the dtype {tensor.dtype}, which no state has")
            specs[name] = TensorSpec(DTYPES[tensor.dtype], tensor.shape)
            offsets[name] = tensor.begin
        return specs, offsets

    def read(self, name: str, span: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or a range of it along dimension 0."""
        spec = self.specs[name]
        shape = spec.shape if span is None else (span[1] - span[0], *spec.shape[1:])
        out = torch.empty(shape, dtype=getattr(torch, spec.dtype))
        self.read_into(name, span, out)
        return out

    def read_into(self, name: str, span: tuple[int, int] | None, out: Tensor) -> None:
        """The same, into ``out`` of the same dtype and shape: straight into its memory where it is a CPU's."""
        spec = self.specs[name]
        offset = self._offsets[name]
        if span is not None:
            offset += span[0] * prod(spec.shape[1:]) * ITEMSIZES[spec.dtype]
        if not out.is_contiguous() and out.dim():
            for i, row in enumerate(out):
                first = (span[0] if span else 0) + i
                row.copy_(self.read(name, (first, first + 1))[0])
            return
        flat = out.detach().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), BUFFER_NBYTES):
            piece = flat[start : start + BUFFER_NBYTES]
            here = piece if piece.device.type == "cpu" else torch.empty_like(piece, device="cpu")
            self._fill(bytes_view(here), offset + start)
            if here is not piece:
                piece.copy_(here)

    def _fill(self, view: memoryview, offset: int) -> None:
        while len(view):
            count = os.preadv(self._file.fileno(), [view], offset)
            if not count:
                raise DamagedFile(f"{self.path} is truncated: nothing is at byte {offset:,}")
            view, offset = view[count:], offset + count
