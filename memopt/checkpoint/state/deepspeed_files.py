"""What a rank's file of DeepSpeed's has where a memopt.Optimizer was stepped: the state of vectors, in codes, or of the
rows behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from memopt.checkpoint.conversion.param_state import ParamState
from memopt.checkpoint.importers import own_dict
from memopt.checkpoint.state.saved import LivePiece, Record, SavedGroup, Source, Stored
from memopt.core.rows import Rows, Shape
from memopt.layout.replaced_state import own_entries
from memopt.partitions.deepspeed.spans import Span
from memopt.placements.stores.by_placement import PlacementStores
from memopt.rules import RULES
from memopt.untrusted import Refused
from memopt.untrusted.text import shown


@final
@dataclass(frozen=True)
class Encoded:
    """Elements ``start`` up to ``stop`` of one moment of a vector, decoded as they are read."""

    stored: Stored
    start: int
    stop: int

    def numel(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: Any) -> Tensor:
        first, stop, _ = part.indices(self.numel())
        return self.stored.decode(Rows(self.stored.shape, self.start + first, self.start + max(stop, first), 1))

    def between(self, first: int, stop: int) -> Encoded:
        return Encoded(self.stored, self.start + first, min(self.start + stop, self.stop))


#: Elements in one dimension, or the codes of such.
FlatVector = Tensor | Encoded


def between(flat: FlatVector, first: int, stop: int) -> FlatVector:
    return flat.between(first, stop) if isinstance(flat, Encoded) else flat[first:stop]


def pieces_of(
    flats: Sequence[Mapping[str, FlatVector]], moment: str, weights: str, first: int, stop: int
) -> Iterator[FlatVector]:
    """Elements ``first`` up to ``stop`` of one moment of vectors that follow one another, as long as their ``weights``.
    Groups of another rule have none."""
    begin = 0
    for flat in flats:
        end = begin + flat[weights].numel()
        if moment in flat and begin < stop and first < end:
            yield between(flat[moment], max(first - begin, 0), min(stop, end) - begin)
        begin = end


def vectors(base: Mapping[str, Any], origin: str) -> tuple[Source, list[dict[str, Encoded]]]:
    """The optimizer's dictionary, and for each vector its moments."""
    source = own_dict.read(base, origin)
    return source, [
        {name: Encoded(stored, 0, record.shape[0]) for name, stored in record.moments.items()}
        for record in source.records.values()
    ]


def is_of_rows(base: Mapping[str, Any]) -> bool:
    return base["memopt"].get("cut") is not None


def of_rows(files: Sequence[tuple[str, Mapping[str, Any]]], shapes: Mapping[str, Shape]) -> Source:
    """The state of each parameter, from the optimizer's dictionaries of all ranks, ``(file, dictionary)``. A row that
    is cut between ranks is on each of them, the same."""
    origin, first = files[0]
    spec = own_dict.spec_of(first["memopt"], origin)
    parts: dict[str, list[tuple[Rows, Record]]] = {}
    hyper: dict[str, dict[str, Any]] = {}
    frozen: list[str] = []
    for origin, base in files:
        saved = base["memopt"]
        numbers = {number: group for group in base["param_groups"] for number in group["params"]}
        if len(numbers) != len(saved["cut"]):
            raise Refused(f"{origin} has {len(numbers)} parameters in its groups, and cuts {len(saved['cut'])}")
        for (number, group), (name, cut) in zip(numbers.items(), saved["cut"].items(), strict=True):
            state = base["state"].get(number) or {}
            if not isinstance(cut, list) or [type(n) for n in cut] != [int, int] or (state and name not in shapes):
                raise Refused(f"{origin} cuts {shown(name)} at {shown(cut)}, which is not a parameter of the model's")
            hyper.setdefault(name, own_dict.plain(group))
            if name not in shapes:
                frozen.append(name)
                continue
            rows = Span(*cut).rows(shapes[name])
            if state and rows.count:
                parts.setdefault(name, []).append((rows, _record(spec, hyper[name], name, rows, state, origin)))
    records = {
        name: _together(name, shape, parts[name])
        if name in parts
        else Record(name, shape, stepped=False, dtype="float32")
        for name, shape in shapes.items()
    }
    records |= {name: Record(name, (), stepped=False) for name in frozen}
    groups = own_dict.groups_of(first, list(first["memopt"]["cut"]))
    return Source(spec, groups, records, origin, seed=first["memopt"].get("seed"), label=str(spec))


def named(
    own: Source, origin: str, asked: str | None, shapes: Sequence[Mapping[str, Shape]], found: Mapping[str, Record]
) -> Source:
    """``own`` as the state of parameters: ``found`` has their weights, and the moments where ``own`` was of vectors and
    has none."""
    if asked not in (None, own.spec.rule):
        raise ValueError(f"{origin} is of {own.spec.rule}, not {asked!r}")
    records, groups = dict(found), own.groups
    if own.records:
        for name, rows in own.records.items():
            weights = found[name].weights if name in found else None
            records[name] = Record(name, rows.shape, rows.step, rows.moments, rows.stepped, rows.dtype, None, weights)
    else:
        groups = [SavedGroup(list(names), group.hyper) for names, group in zip(shapes, own.groups, strict=True)]
    return Source(
        own.spec,
        groups,
        records,
        origin,
        seed=own.seed,
        skipped_steps=own.skipped_steps,
        label=f"{own.spec} in DeepSpeed",
    )


def _record(spec: Any, h: Mapping[str, Any], name: str, rows: Rows, state: Mapping[str, Any], origin: str) -> Record:
    rule = RULES[spec.rule_of(h)]
    own = own_entries(rule.name, state)
    ours = {key: value for key, value in state.items() if key not in own}
    stores = PlacementStores(spec.replace(placement="device", overrides={}), 0, 1)
    cpu = torch.device("cpu")
    full_h = rule.keeping({**rule.hyperparameters, **h}, ours)
    param = ParamState(spec, full_h, name, 0, rows, cpu, 0, lambda x: x, "float32", stores)
    own_dict.check(param, ours, origin)
    return param.record(ours)


def _together(name: str, shape: Shape, parts: list[tuple[Rows, Record]]) -> Record:
    """One record of what several ranks have of a parameter, each row taken from the first that has it."""
    parts.sort(key=lambda part: part[0].first)
    _, one = parts[0]
    moments = {}
    for moment, stored in one.moments.items():
        pieces, end = [], 0
        for rows, record in parts:
            here = record.moments[moment]
            inner = rows._replace(first=max(rows.first, end))
            if inner.count <= 0:
                continue
            if rows.first > end:
                raise Refused(f"{name} has no rows {end} to {rows.first - 1} on any rank")
            found = {}
            for part in here.format.layout(here.moment, rows):
                x = here.pieces[0].read(part, None)
                shared = here.format.is_shared(here.moment, part, shape)
                span = None if shared else here.format.span(here.moment, part, rows, inner)
                found[part] = x if span is None else x[slice(*span)]
            pieces.append(LivePiece(inner, found))
            end = rows.stop
        if end != Rows.whole(shape).stop:
            raise Refused(f"{name} has {end} rows on all ranks together, and its shape is {list(shape)}")
        moments[moment] = Stored(stored.moment, stored.format, shape, tuple(pieces))
    return Record(name, shape, one.step, moments, dtype="float32")
