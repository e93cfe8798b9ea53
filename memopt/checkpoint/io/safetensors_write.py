"""safetensors files written a piece at a time, with their checksums, and made durable."""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.io.worker_thread import Worker
from memopt.checkpoint.tensorfile import (
    BUFFER_NBYTES,
    CHUNK_NBYTES,
    CODES,
    ITEMSIZES,
    FileInfo,
    Progress,
    checksums,
    nbytes_of,
    spec_of,
)
from memopt.core.host_memory import bytes_view
from memopt.core.ledger import TensorSpec

#: Pieces that wait for their checksum while the next are written.
PENDING = 4
#: Bytes after which the disk is told to begin: what it has by the end need not be waited for.
SYNC_NBYTES = 64 * 2**20
#: Bytes of small tensors that are written together.
TOGETHER_NBYTES = 2**20


def file_order(specs: dict[str, TensorSpec]) -> list[str]:
    """Names in the order of the file: wide dtypes first, so that a tensor stands at a multiple of its item size."""
    return sorted(specs, key=lambda name: -ITEMSIZES[specs[name].dtype])


def write_file(
    path: Path,
    specs: dict[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Progress = lambda nbytes: None,
    *,
    syncing: Syncing | None = None,
) -> FileInfo:
    """Write tensors and make them durable, or leave that to ``syncing``. Every name of ``specs`` must come once, in any
    order; in that of :func:`file_order` the file need not be read again for its checksums."""
    text, offsets, nbytes = _header(specs)
    with Syncing() as own, open(path, "wb", buffering=0) as file, _Pipeline(path, file, syncing or own) as pipeline:
        pipeline.write(memoryview(text), 0)
        for name, tensor in tensors:
            assert spec_of(tensor) == specs[name], f"{name}: {spec_of(tensor)} where {specs[name]} was announced"
            offset = offsets.pop(name)
            for piece in _pieces(tensor):
                pipeline.write(piece, offset)
                offset += len(piece)
                progress(len(piece))
            del tensor  # the next may be made when it is asked for
        assert not offsets, f"{path}: {next(iter(offsets))} was announced and did not come"
        sums = pipeline.join()
        own.wait()
    return FileInfo(nbytes, list(checksums(path)) if sums is None else sums)


def _header(specs: dict[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """``(the first bytes of the file, where each tensor begins, the size of the file)``"""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in file_order(specs):
        spec = specs[name]
        span = [end, end + nbytes_of(spec)]
        header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    offsets = {name: begin + header[name]["data_offsets"][0] for name in specs}
    return len(text).to_bytes(8, "little") + text, offsets, begin + end


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in order, from its own memory where that is a CPU's and contiguous."""
    tensor = tensor.detach()
    if not tensor.is_contiguous() and tensor.dim():
        for row in tensor:
            yield from _pieces(row.contiguous())
        return
    flat = tensor.reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), BUFFER_NBYTES):
        yield bytes_view(flat[start : start + BUFFER_NBYTES].cpu())


class Syncing:
    """Files that the disk still has to take: while it does, the next file is written."""

    def __init__(self) -> None:
        self._pool = Worker("memopt.sync")
        self._waiting: list[tuple[Path, Future[None]]] = []

    def __enter__(self) -> Syncing:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def begin(self, path: Path, handle: int, sync: Callable[[int], None] = os.fdatasync) -> Future[None]:
        """Tell the disk to take what has been written so far; :meth:`wait` says whether it did. The file may be closed
        meanwhile."""
        self._waiting.append((path, self._pool.submit(_sync, os.dup(handle), sync)))
        return self._waiting[-1][1]

    def wait(self) -> None:
        """Until all files are durable. Raises OSError with the file that is not."""
        for path, done in self._waiting:
            try:
                done.result()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
        self._waiting = []


def _sync(handle: int, sync: Callable[[int], None]) -> None:
    try:
        sync(handle)
    finally:
        os.close(handle)


class _Pipeline:
    """Bytes go to the file here, while one thread takes checksums and another tells the disk to begin."""

    def __init__(self, path: Path, file: Any, syncing: Syncing) -> None:
        self._path, self._file = path, file
        self._adding, self._syncing = Worker("memopt.checksums"), syncing
        self._sums: list[str] = []
        self._crc = self._filled = 0
        self._pending: deque[Future[None]] = deque()
        self._sync: Future[None] | None = None
        self._end = self._synced = 0
        self._in_order = True
        self._small, self._begin = bytearray(), 0  # what is not in the file yet, and where it begins

    def __enter__(self) -> _Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._adding.shutdown()

    def write(self, piece: memoryview, offset: int) -> None:
        """Piece and offset in the file; of a small piece the bytes are taken, a large one must not change until
        :meth:`finish`."""
        if offset != self._begin + len(self._small) or len(piece) >= TOGETHER_NBYTES:
            self._flush()
            self._begin = offset
        if len(piece) >= TOGETHER_NBYTES:
            self._write(piece, offset)
            self._begin += len(piece)
            return
        self._small += piece
        if len(self._small) >= TOGETHER_NBYTES:
            self._flush()

    def _flush(self) -> None:
        if self._small:
            self._write(memoryview(self._small), self._begin)
            self._begin += len(self._small)
            self._small = bytearray()

    def _write(self, piece: memoryview, offset: int) -> None:
        if offset != self._file.tell():
            self._in_order = False
            self._file.seek(offset)
        if self._in_order:
            self._pending.append(self._adding.submit(self._add, piece))
        rest = piece
        while len(rest):
            rest = rest[self._file.write(rest) :]
        self._end += len(piece)
        if self._end - self._synced >= SYNC_NBYTES and (self._sync is None or self._sync.done()):
            self._sync, self._synced = self._syncing.begin(self._path, self._file.fileno()), self._end
        while len(self._pending) > PENDING:
            self._pending.popleft().result()

    def _add(self, piece: memoryview) -> None:
        """Take the piece into the running checksum, chunk by chunk."""
        while len(piece):
            part = piece[: CHUNK_NBYTES - self._filled]
            self._crc, self._filled, piece = zlib.crc32(part, self._crc), self._filled + len(part), piece[len(part) :]
            if self._filled == CHUNK_NBYTES:
                self._sums.append(f"{self._crc:08x}")
                self._crc = self._filled = 0

    def join(self) -> list[str] | None:
        """The checksums, or None where the file was not written in order."""
        self._flush()
        self._syncing.begin(self._path, self._file.fileno(), os.fsync)
        for pending in self._pending:
            pending.result()
        if self._filled:
            self._sums.append(f"{self._crc:08x}")
        return self._sums if self._in_order else None
