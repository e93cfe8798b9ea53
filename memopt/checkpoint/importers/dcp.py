"""torch.distributed.checkpoint folders, as ``dcp.save`` writes ``get_optimizer_state_dict`` of torch.optim's under
FSDP, read without a process group.

``.metadata`` is a pickle that says which file has which piece of which tensor; it is read as a tree of plain values.
The pieces are what ``torch.save`` wrote, one after another in a rank's file.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt.checkpoint.importers import safe_unpickle, torch_optim
from memopt.checkpoint.importers.base import choose, factors, group_of, steps
from memopt.checkpoint.importers.gathered import gathered
from memopt.checkpoint.state.saved import Record, Source, Stored
from memopt.core.rows import Shape
from memopt.spec import OptimSpec
from memopt.untrusted import Refused, laid_out
from memopt.untrusted.names import label, within
from memopt.untrusted.opening import open_regular, read_exactly, read_file, size_of
from memopt.untrusted.text import shown

NAME = "torch.distributed.checkpoint"
METADATA = ".metadata"
_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.serialization",
    "collections",
    "pathlib",
    "pathlib._local",
)
#: Bytes of the metadata; of a model of a thousand shards for each of ten thousand tensors it has about a tenth.
MAX_METADATA_NBYTES = 2**33


class _SavedBox(NamedTuple):
    """A box of a tensor, and where its bytes are."""

    offsets: Shape
    file: str
    offset: int
    nbytes: int


class _Entry(NamedTuple):
    """One entry of the saved dictionary; ``shape`` is None for what is not a tensor."""

    path: tuple[Any, ...]
    shape: Shape | None
    chunks: list[_SavedBox]


def find(path: Path) -> Path | None:
    return path if (path / METADATA).is_file() else None


def read(path: Path, rule: str | None) -> Source:
    """The optimizer state in the folder. Raises ValueError for what is damaged, missing, or of another optimizer."""
    with laid_out(str(path), "a checkpoint of torch.distributed.checkpoint"):
        return _read(path, rule)


def _read(path: Path, rule: str | None) -> Source:
    entries = _entries(path)
    read_chunk = _reader(path)
    prefix = _optimizer(path, entries)
    inside = [_split(e._replace(path=e.path[len(prefix) :])) for e in entries if e.path[: len(prefix)] == prefix]
    states: dict[str, dict[str, _Entry]] = {}
    for entry in inside:
        if entry.path[0] == "state" and len(entry.path) == 3:
            states.setdefault(str(entry.path[1]), {})[str(entry.path[2])] = entry
    groups = _groups(path, inside, read_chunk)
    chosen = choose(NAME, str(path), torch_optim.rules(groups[0], {}), rule)
    ours, records = [], {}
    for group in groups:
        names = [str(name) for name in group["params"]]
        ours.append(group_of(names, chosen, torch_optim.hyper(group, chosen), group))
        for name in names:
            records[name] = _record(name, states.get(name, {}), read_chunk)
    return Source(OptimSpec(rule=chosen), ours, records, str(path), label=f"{chosen} of {NAME}")


def _entries(path: Path) -> list[_Entry]:
    file = within(path, METADATA, str(path))
    content = read_file(file, MAX_METADATA_NBYTES, "metadata")
    metadata = safe_unpickle.tree(content, _MODULES, str(file))
    with laid_out(str(file), "the metadata of torch.distributed.checkpoint"):
        where: dict[str, list[_SavedBox]] = {}
        sizes: dict[str, int] = {}
        for index, info in metadata.storage_data.items():
            if getattr(info, "transform_descriptors", None):
                raise Refused(f"{file}: {shown(info.relative_path)} is compressed, and is not read")
            offsets = _numbers(getattr(index, "offset", None) or (), f"{file}: the offsets of a piece")
            chunk = _SavedBox(offsets, info.relative_path, *_numbers((info.offset, info.length), f"{file}: a range"))
            if chunk.file not in sizes:
                sizes[chunk.file] = _size(path, chunk.file, str(file))
            if chunk.offset + chunk.nbytes > sizes[chunk.file]:
                raise Refused(
                    f"{path / chunk.file} is truncated: it ends before byte {chunk.offset + chunk.nbytes:,}, where "
                    f"{file} says that a piece of {shown(index.fqn)} ends"
                )
            where.setdefault(index.fqn, []).append(chunk)
        _refuse_overlaps([chunk for chunks in where.values() for chunk in chunks], str(file))
        found = []
        for key, kind in metadata.state_dict_metadata.items():
            shape = _numbers(kind.size, f"{file}: the shape of {shown(key)}") if hasattr(kind, "chunks") else None
            parts = tuple(metadata.planner_data[key])
            for part in parts:
                label(part if isinstance(part, str) else str(_numbers((part,), f"{file}: a key")), str(file))
            chunks = sorted(where[key], key=lambda chunk: chunk.offsets)
            if not parts or (shape is not None and prod(shape) > 8 * sum(chunk.nbytes for chunk in chunks)):
                raise Refused(f"{file}: {shown(key)} has the shape {shown(shape)}, and there are too few bytes for it")
            if shape is not None and any(len(chunk.offsets) != len(shape) for chunk in chunks if shape):
                raise Refused(f"{file}: the pieces of {shown(key)} have other dimensions than it has")
            found.append(_Entry(parts, shape, chunks))
        return found


def _refuse_overlaps(chunks: list[_SavedBox], origin: str) -> None:
    """Pieces that lie within each other would be read as often as they are named."""
    name, end = "", 0
    for chunk in sorted(chunks, key=lambda chunk: (chunk.file, chunk.offset)):
        if chunk.file == name and chunk.offset < end:
            raise Refused(f"{origin}: two pieces have byte {chunk.offset:,} of {chunk.file}")
        name, end = chunk.file, chunk.offset + chunk.nbytes


def _numbers(values: Any, what: str) -> Shape:
    """Whole numbers, as a shape or offsets have them."""
    if not isinstance(values, (tuple, list)) or not all(type(n) is int and 0 <= n < 2**62 for n in values):
        raise Refused(f"{what} is {shown(values)}, not whole numbers")
    return tuple(values)


def _size(path: Path, name: Any, origin: str) -> int:
    try:
        with open_regular(within(path, name, origin)) as opened:
            return size_of(opened)
    except OSError as error:
        raise ValueError(f"{path / name} cannot be read: {error.strerror}") from None


def _optimizer(path: Path, entries: list[_Entry]) -> tuple[Any, ...]:
    """Where the optimizer stands in the saved dictionary."""
    found: dict[tuple[Any, ...], None] = {}
    for entry in entries:
        for i, part in enumerate(entry.path):
            if str(part).partition(".")[0] == "param_groups":
                found[entry.path[:i]] = None
                break
    if len(found) != 1:
        what = "no optimizer" if not found else f"{len(found)} optimizers, and one is read"
        raise ValueError(f"{path} holds {what}: the keys are {', '.join(str(e.path[0]) for e in entries[:5])}, …")
    return next(iter(found))


def _split(entry: _Entry) -> _Entry:
    """``("state.NAME.exp_avg",)``, of a flattened dictionary, as ``("state", NAME, "exp_avg")``."""
    kind, _, rest = str(entry.path[0]).partition(".")
    name, _, key = rest.rpartition(".")
    return entry._replace(path=(kind, name, key)) if len(entry.path) == 1 and rest else entry


def _groups(path: Path, inside: list[_Entry], read_chunk: Callable[[_SavedBox], Any]) -> list[dict[str, Any]]:
    """The param groups, with the names of their parameters under ``params``. A flattened dictionary has the
    hyperparameters of every parameter: those that share all of them are one group."""
    found: dict[Any, dict[str, Any]] = {}
    for entry in inside:
        if entry.path[0] == "param_groups" and len(entry.path) == 3:
            found.setdefault(entry.path[1], {})[str(entry.path[2])] = _plain(read_chunk(entry.chunks[0]))
    if not found:
        raise ValueError(f"{path} has no param groups that are known here")
    if all(isinstance(key, int) for key in found):
        return [found[key] for key in sorted(found)]
    merged: dict[str, dict[str, Any]] = {}
    for name, h in found.items():
        merged.setdefault(repr(sorted(h.items())), {**h, "params": []})["params"].append(name)
    return list(merged.values())


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(f"{where} has taken {shown(value)} steps")
    return steps(float(value), where)


def _record(name: str, state: dict[str, _Entry], read_chunk: Callable[[_SavedBox], Any]) -> Record:
    step = _number(_plain(read_chunk(state["step"].chunks[0])), name) if "step" in state else 1.0
    moments: dict[str, Stored] = {}
    for key, entry in state.items():
        if key not in ("step", "row_var", "col_var") and entry.shape is not None:
            moment = "exp_avg_sq" if key == "variance" else key
            moments[moment] = gathered(moment, entry.shape, _gather(entry, entry.shape, read_chunk))
    if "row_var" in state:
        row, col = (_whole(state[key], read_chunk) for key in ("row_var", "col_var"))
        moments["exp_avg_sq"] = factors(row, col)
    if not moments:
        return Record(name, (), stepped=False)
    shape = next(iter(moments.values())).shape
    other = next((moment for moment, stored in moments.items() if stored.shape != shape), None)
    if other is not None:
        raise Refused(f"{name} is {list(shape)}, and its {other} is {list(moments[other].shape)}")
    return Record(name, shape, step, moments)


def _whole(entry: _Entry, read_chunk: Callable[[_SavedBox], Any]) -> Tensor:
    assert entry.shape is not None
    return _gather(entry, entry.shape, read_chunk)(0, prod(entry.shape)).view(entry.shape)


def _gather(entry: _Entry, shape: Shape, read_chunk: Callable[[_SavedBox], Any]) -> Callable[[int, int], Tensor]:
    """Elements of the flattened tensor; the range must be of whole rows."""
    inner = prod(shape[1:])
    begins = sorted({chunk.offsets[0] for chunk in entry.chunks}) if shape else []

    def gather(first: int, stop: int) -> Tensor:
        where = ".".join(map(str, entry.path))
        if not shape:
            return _tensor_of(read_chunk(entry.chunks[0]), where).reshape(1)
        low, high = (first // inner, stop // inner) if inner else (0, 0)
        out = torch.empty(high - low, *shape[1:])
        seen = torch.zeros(out.shape, dtype=torch.bool)
        for box in _overlapping(entry.chunks, begins, low, high):
            piece = _tensor_of(read_chunk(box), where)
            ends = [offset + n for offset, n in zip(box.offsets, piece.shape, strict=False)]
            if piece.dim() != len(shape) or any(end > n for end, n in zip(ends, shape, strict=True)):
                raise Refused(f"{where}: a piece of {list(piece.shape)} at {list(box.offsets)} is not in {list(shape)}")
            begin, end = box.offsets[0], box.offsets[0] + piece.shape[0]
            piece = piece[max(low - begin, 0) : high - begin]
            rows = slice(max(begin - low, 0), min(end, high) - low)
            rest = [slice(o, o + n) for o, n in zip(box.offsets[1:], piece.shape[1:], strict=True)]
            out[(rows, *rest)] = piece
            seen[(rows, *rest)] = True
        if not seen.all():
            raise ValueError(f"{where}: {int(seen.sum()):,} of {out.numel():,} elements are there")
        return out.view(-1)

    return gather


def _tensor_of(value: Any, where: str) -> Tensor:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype == torch.int64):
        raise Refused(f"{where} is {shown(value)}, not a tensor of numbers")
    return value


def _overlapping(chunks: list[_SavedBox], begins: list[int], low: int, high: int) -> Iterator[_SavedBox]:
    """Boxes that may have rows ``[low, high)``: of those that begin before them, none that another ends. ``chunks`` are
    in the order of their offsets, ``begins`` are the first of those, each once."""
    at = bisect_right(begins, low) - 1  # the last that begins at or before the rows
    first = begins[at] if at >= 0 else 0
    for chunk in chunks[bisect_left(chunks, first, key=lambda chunk: chunk.offsets[0]) :]:
        if chunk.offsets[0] >= high:
            return
        yield chunk


def _reader(path: Path) -> Callable[[_SavedBox], Any]:
    """What reads a chunk: a tensor or a plain value. The last few are remembered, being read in pieces."""

    @lru_cache(maxsize=2)
    def read_chunk(chunk: _SavedBox) -> Any:
        try:
            with open_regular(within(path, chunk.file, str(path / METADATA))) as file:
                file.seek(chunk.offset)
                content = read_exactly(file, chunk.nbytes)
        except OSError as error:
            raise ValueError(f"{path / chunk.file} cannot be read: {error.strerror}") from None
        if len(content) != chunk.nbytes:
            raise ValueError(f"{path / chunk.file} is truncated: it ends before byte {chunk.offset + chunk.nbytes:,}")
        return safe_unpickle.unpickled_bytes(content, str(path / chunk.file))

    return read_chunk
