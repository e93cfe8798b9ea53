"""What ``torch.save`` wrote, read without torch's unpickler.

A file is an uncompressed zip archive: a pickle, and the bytes of each storage. The pickle is read by
:mod:`memopt.untrusted.pickles`; storages are mapped, so a tensor takes memory when it is read. A tensor has no more
elements than there are bytes for, which also leaves out those that are one element repeated.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memopt.untrusted import Refused, torch_rebuild
from memopt.untrusted.opening import open_regular, read_exactly, size_of
from memopt.untrusted.pickle_machine import Call, Names
from memopt.untrusted.pickles import inert_classes, read_pickle
from memopt.untrusted.text import printable, shown

#: All tensors of a file together, per byte of it: some are there several times (tied weights). One of few elements
#: counts as so many bytes, which is what it takes in memory.
MAX_SHARED, MIN_NBYTES = 16, 512

#: ``torch.FloatStorage`` and its like -> the dtype of their elements.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *_STORAGES.values(),
        *(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")),
    )
}


class _Storage:
    """The bytes of a storage: as many elements as the pickle says, or as bytes where it does not say of which dtype."""

    def __init__(self, buffer: Any, dtype: torch.dtype | None) -> None:
        self.buffer, self.dtype = buffer, dtype


def read_torch_file(path: Path, classes: Mapping[str, Any]) -> Any:
    """The content of a file. ``classes`` are names that it may have beside torch's: see
    :func:`~memopt.untrusted.pickles.inert_classes`. Raises :class:`Refused` for one that is damaged, names anything
    else, or says what cannot be."""
    with open_regular(path) as file:
        if not size_of(file):
            raise Refused(f"{printable(str(path))} is empty")
        memory: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _read(file, memory, str(path), classes)


def read_torch_bytes(content: bytes, origin: str, classes: Mapping[str, Any]) -> Any:
    """The same, of bytes that ``torch.save`` wrote somewhere within a file."""
    return _read(io.BytesIO(content), bytearray(content), origin, classes)


def _read(file: Any, memory: Any, origin: str, classes: Mapping[str, Any]) -> Any:
    origin = printable(origin)
    try:
        archive = _Archive(file, len(memory))
        content, root = archive.pickle(memory)
    except (
        Refused,
        zipfile.BadZipFile,
        ValueError,
        LookupError,
        NotImplementedError,
        OSError,
        EOFError,
        struct.error,
    ) as error:
        reason = printable(str(error), 200)
        if bytes(memory[:2]) != b"PK" and memory[:1] != b"\x80":  # the first bytes of an archive, of a pickle
            raise Refused(f"{origin} is no checkpoint: it is not what torch.save writes") from None
        raise Refused(
            f"{origin} cannot be read without executing what it says, or is damaged: it is not what torch.save "
            f"writes ({reason})"
        ) from None
    reader = _Tensors(archive, memory, root)
    return read_pickle(content, reader.names(classes), origin, reader.storage)


class _Archive:
    """Where the members of a zip archive are, none of them compressed or in another."""

    def __init__(self, file: io.FileIO | io.BytesIO, size: int) -> None:
        self.spans: dict[str, tuple[int, int]] = {}
        self._sums: dict[str, int] = {}
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise Refused(f"its member {shown(member.filename)} is compressed")
            if member.flag_bits & 1 or member.filename in self.spans:
                raise Refused(f"its member {shown(member.filename)} is encrypted, or there twice")
            file.seek(member.header_offset)
            head = read_exactly(file, 30)
            if len(head) < 30 or head[:4] != b"PK\3\4":
                raise Refused(f"its member {shown(member.filename)} is not where it is said to be")
            lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            begin = member.header_offset + 30 + lengths
            self.spans[member.filename] = begin, begin + member.file_size
            self._sums[member.filename] = member.CRC
        end = 0
        for begin, stop in sorted(self.spans.values()):
            if begin < end or stop > size:
                raise Refused("its members lie within each other, or behind its end")
            end = stop

    def pickle(self, memory: Any) -> tuple[bytes, str]:
        """The pickle, and the folder in the archive that it and its storages are in."""
        found = [name for name in self.spans if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(found) != 1:
            raise Refused("it has no data.pkl")
        root = found[0].removesuffix("data.pkl")
        order = self.spans.get(root + "byteorder")
        if order is not None and bytes(memory[slice(*order)]) != b"little":
            raise Refused("it was written by a machine of another byte order")
        content = bytes(memory[slice(*self.spans[found[0]])])
        if zlib.crc32(content) != self._sums[found[0]]:
            raise Refused("its data.pkl is not what was written: the checksum differs")
        return content, root


class _Tensors:
    """What the pickle of one file names: storages of the archive, tensors in them."""

    def __init__(self, archive: _Archive, memory: Any, root: str) -> None:
        self._archive, self._memory, self._root = archive, memory, root
        self._storages: dict[str, Any] = {}
        self._left = MAX_SHARED * (len(memory) + MIN_NBYTES)

    def names(self, classes: Mapping[str, Any]) -> Names:
        real: dict[str, Any] = {
            "collections.OrderedDict": Call(torch_rebuild.ordered),
            "collections.Counter": Call(torch_rebuild.counter),
            "collections.defaultdict": Call(lambda *arguments: {}),
            "builtins.set": Call(torch_rebuild.plain_set),
            "builtins.complex": Call(torch_rebuild.plain_complex),
            "builtins.bytearray": Call(torch_rebuild.plain_bytes),
            "_codecs.encode": Call(torch_rebuild.latin),
            "torch.Size": Call(torch_rebuild.size),
            "torch.device": Call(lambda *named: ":".join(map(str, named))),
            "torch.serialization._get_layout": Call(lambda name: name),
            "torch.nn.parameter.Parameter": "Parameter",
            "torch._utils._rebuild_tensor": Call(self._tensor),
            "torch._utils._rebuild_tensor_v2": Call(self._tensor),
            "torch._utils._rebuild_tensor_v3": Call(self._tensor_of_bytes),
            "torch._utils._rebuild_parameter": Call(lambda data, *flags: torch_rebuild.a_tensor(data)),
            "torch._utils._rebuild_parameter_with_state": Call(lambda data, *flags: torch_rebuild.a_tensor(data)),
            "torch._utils._rebuild_wrapper_subclass": Call(torch_rebuild.no_subclass),
            "torch._tensor._rebuild_from_type_v2": Call(torch_rebuild.subclass),
            "torch.storage.UntypedStorage": "UntypedStorage",
            "torch.Tensor": "Tensor",
            **{f"torch.{name}": name for name in _STORAGES},
            **_DTYPES,
        }
        return inert_classes((), {**real, **classes})

    def storage(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[2], str):
            raise Refused("it refers to something that is not a storage")
        _, kind, key, _, numel = pid
        span = self._archive.spans.get(f"{self._root}data/{key}")
        if span is None or (kind not in _STORAGES and kind != "UntypedStorage"):
            raise Refused(f"its storage {shown(key)} of {shown(kind)} is not there")
        dtype = _STORAGES.get(kind)
        if type(numel) is not int or numel * (dtype or torch.uint8).itemsize != span[1] - span[0]:
            raise Refused(f"its storage {shown(key)} of {shown(numel)} elements has {span[1] - span[0]:,} bytes")
        if key not in self._storages:
            begin, stop = span
            whole = begin % 16 == 0  # else elements would not be at multiples of their size
            self._storages[key] = memoryview(self._memory)[begin:stop] if whole else bytearray(self._memory[begin:stop])
        return _Storage(self._storages[key], dtype)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
        if not isinstance(storage, _Storage) or storage.dtype is None:
            raise Refused("a tensor in what is no storage of numbers")
        return self._made(storage, storage.dtype, offset, size, stride)

    def _tensor_of_bytes(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
    ) -> Tensor:
        if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
            raise Refused("a tensor in what is no storage of numbers")
        return self._made(storage, dtype, offset, size, stride)

    def _made(self, storage: _Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
        elements = len(storage.buffer) // dtype.itemsize
        sizes, strides = torch_rebuild.whole(size), torch_rebuild.whole(stride)
        if type(offset) is not int or not 0 <= offset <= elements or sizes is None or strides is None:
            raise Refused(f"a tensor of shape {shown(size)} at {shown(offset)}, which cannot be")
        numel, last = 1, offset
        for n, step in zip(sizes, strides, strict=True):
            numel, last = numel * n, last + (n - 1) * step
        if numel and (last >= elements or numel > elements or last > 2**62):
            raise Refused(f"a tensor of {numel:,} elements in a storage of {elements:,}")
        self._left -= max(numel * dtype.itemsize, MIN_NBYTES)
        if self._left < 0:
            raise Refused("its tensors together are many times what the file has")
        if not numel:
            return torch.empty(sizes, dtype=dtype)
        flat = torch.frombuffer(storage.buffer, dtype=torch.uint8)[: elements * dtype.itemsize].view(dtype)
        return flat.as_strided(sizes, strides, offset)
