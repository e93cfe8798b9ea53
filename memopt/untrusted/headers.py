"""The header of a safetensors file: eight bytes of length, JSON, and behind it every byte of every tensor, in order.

The rules are the format's own: no key twice, no gap and no overlap between tensors, nothing behind the last one.
"""

from __future__ import annotations

import io
from math import prod
from typing import Any, NamedTuple

from memopt.untrusted import Refused
from memopt.untrusted.documents import parse_json
from memopt.untrusted.opening import read_exactly, size_of
from memopt.untrusted.text import printable, shown

#: safetensors' own bound on the header.
MAX_HEADER_NBYTES = 100_000_000
#: Dimensions of a tensor, and of one dimension's length: torch's own bounds.
MAX_DIMENSIONS, MAX_LENGTH = 64, 2**63 - 1
#: Bits of an element.
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
}


class TensorHeader(NamedTuple):
    """``begin``: where its bytes begin in the file; ``dtype``: the format's own name."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_header(file: io.FileIO, origin: str) -> dict[str, TensorHeader]:
    """The tensors of the open file by name. Raises :class:`Refused` with what is wrong with its header."""
    try:
        return _read(file)
    except Refused as error:
        raise Refused(f"{printable(origin)} is not a safetensors file, or its header is damaged: {error}") from None


def _read(file: io.FileIO) -> dict[str, TensorHeader]:
    size = size_of(file)
    length = int.from_bytes(read_exactly(file, 8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_NBYTES):
        raise Refused(f"a header of {length:,} bytes in a file of {size:,}")
    header = parse_json(read_exactly(file, length), "it")
    if not isinstance(header, dict):
        raise Refused(f"it is {shown(header)}, not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused(f"__metadata__ is {shown(metadata)}, not an object of texts")
    begin = 8 + length
    found = {name: _tensor(name, entry, begin) for name, entry in header.items()}
    end = begin
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != end:
            raise Refused(f"{shown(name)} begins at byte {tensor.begin:,}, and what is before it ends at {end:,}")
        end += tensor.nbytes
    if end != size:
        raise Refused(f"its tensors end at byte {end:,} of {size:,}")
    return found


def _tensor(name: str, entry: Any, begin: int) -> TensorHeader:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise Refused(f"{shown(name)} is not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Refused(f"{shown(name)} has the dtype {shown(dtype)}, which is not known")
    if not _whole(shape) or len(shape) > MAX_DIMENSIONS or prod([n or 1 for n in shape]) > MAX_LENGTH:
        raise Refused(f"{shown(name)} has no shape that a tensor can have")
    if not _whole(offsets) or len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != prod(shape) * BITS[dtype]:
        raise Refused(f"the offsets of {shown(name)} are not those of {prod(shape):,} elements of {dtype}")
    return TensorHeader(dtype, tuple(shape), begin + offsets[0], offsets[1] - offsets[0])


def _whole(numbers: Any) -> bool:
    """Whether these are numbers as a shape or offsets have them; True and False are none."""
    if type(numbers) is not list:
        return False
    for n in numbers:  # noqa: SIM110 - all(...) takes three times as long, and a file has thousands of tensors
        if type(n) is not int or not 0 <= n <= MAX_LENGTH:
            return False
    return True
