"""torch.distributed.checkpoint folders, as ``dcp.save`` writes ``get_optimizer_state_dict`` of torch.optim's under
FSDP, read without a process group.

``.metadata`` is a pickle that says which file has which piece of which tensor; it is read as a tree of plain values.
The pieces are what ``torch.save`` wrote, one after another in a rank's file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt.checkpoint.foreign import inert, torch_optim
from memopt.checkpoint.foreign.base import choose, factors, group_of
from memopt.checkpoint.foreign.gathered import gathered
from memopt.checkpoint.stored import Record, Source, Stored
from memopt.geometry import Shape
from memopt.spec import OptimSpec

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
_DAMAGE = (KeyError, IndexError, TypeError, AttributeError, ValueError)


class _Chunk(NamedTuple):
    """A box of a tensor, and where its bytes are."""

    offsets: Shape
    file: str
    offset: int
    nbytes: int


class _Entry(NamedTuple):
    """One entry of the saved dictionary; ``shape`` is None for what is not a tensor."""

    path: tuple[Any, ...]
    shape: Shape | None
    chunks: list[_Chunk]


def find(path: Path) -> Path | None:
    return path if (path / METADATA).is_file() else None


def read(path: Path, rule: str | None) -> Source:
    """The optimizer state in the folder. Raises ValueError for what is damaged, missing, or of another optimizer."""
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
    metadata = inert.tree((path / METADATA).read_bytes(), _MODULES, str(path / METADATA))
    try:
        where: dict[str, list[_Chunk]] = {}
        for index, info in metadata.storage_data.items():
            if Path(info.relative_path).name != info.relative_path or getattr(info, "transform_descriptors", None):
                raise ValueError(f"{info.relative_path} is elsewhere or compressed, and is not read")
            chunk = _Chunk(tuple(getattr(index, "offset", None) or ()), info.relative_path, info.offset, info.length)
            where.setdefault(index.fqn, []).append(chunk)
        found = []
        for key, kind in metadata.state_dict_metadata.items():
            shape = tuple(kind.size) if hasattr(kind, "chunks") else None
            found.append(_Entry(tuple(metadata.planner_data[key]), shape, where[key]))
        return found
    except _DAMAGE as error:
        raise ValueError(f"{path / METADATA} is damaged, or of a version that is not known here: {error}") from None


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


def _groups(path: Path, inside: list[_Entry], read_chunk: Callable[[_Chunk], Any]) -> list[dict[str, Any]]:
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


def _record(name: str, state: dict[str, _Entry], read_chunk: Callable[[_Chunk], Any]) -> Record:
    step = float(read_chunk(state["step"].chunks[0])) if "step" in state else 1.0
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
    return Record(name, next(iter(moments.values())).shape, step, moments)


def _whole(entry: _Entry, read_chunk: Callable[[_Chunk], Any]) -> Tensor:
    assert entry.shape is not None
    return _gather(entry, entry.shape, read_chunk)(0, prod(entry.shape)).view(entry.shape)


def _gather(entry: _Entry, shape: Shape, read_chunk: Callable[[_Chunk], Any]) -> Callable[[int, int], Tensor]:
    """Elements of the flattened tensor; the range must be of whole rows."""
    inner = prod(shape[1:])

    def gather(first: int, stop: int) -> Tensor:
        if not shape:
            return torch.as_tensor(read_chunk(entry.chunks[0])).reshape(1)
        low, high = (first // inner, stop // inner) if inner else (0, 0)
        out, filled = torch.empty(high - low, *shape[1:]), 0
        for box in _overlapping(entry.chunks, low, high):
            piece = read_chunk(box)
            begin, end = box.offsets[0], box.offsets[0] + piece.shape[0]
            piece = piece[max(low - begin, 0) : high - begin]
            rows = slice(max(begin - low, 0), min(end, high) - low)
            rest = [slice(o, o + n) for o, n in zip(box.offsets[1:], piece.shape[1:], strict=True)]
            out[(rows, *rest)] = piece
            filled += piece.numel()
        if filled != out.numel():
            raise ValueError(f"{'.'.join(map(str, entry.path))}: {filled:,} of {out.numel():,} elements are there")
        return out.view(-1)

    return gather


def _overlapping(chunks: list[_Chunk], low: int, high: int) -> Iterator[_Chunk]:
    """Boxes that may have rows ``[low, high)``: of those that begin before them, none that another ends."""
    begins = sorted({chunk.offsets[0] for chunk in chunks})
    for chunk in chunks:
        after = next((b for b in begins if b > chunk.offsets[0]), None)
        if chunk.offsets[0] < high and (after is None or after > low):
            yield chunk


def _reader(path: Path) -> Callable[[_Chunk], Any]:
    """What reads a chunk: a tensor or a plain value. The last few are remembered, being read in pieces."""

    @lru_cache(maxsize=2)
    def read_chunk(chunk: _Chunk) -> Any:
        try:
            with open(path / chunk.file, "rb") as file:
                file.seek(chunk.offset)
                content = file.read(chunk.nbytes)
        except OSError as error:
            raise ValueError(f"{path / chunk.file} cannot be read: {error.strerror}") from None
        if len(content) != chunk.nbytes:
            raise ValueError(f"{path / chunk.file} is truncated: it ends before byte {chunk.offset + chunk.nbytes:,}")
        return inert.loads(content, str(path / chunk.file))

    return read_chunk
