"""The state of parameters as that of DeepSpeed's vectors, in which they lie one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.importers.gathered import Gather, gathered
from memopt.checkpoint.state.saved import Record, SavedGroup, Source, Stored
from memopt.core.param_names import matching
from memopt.core.rows import Rows, Shape
from memopt.partitions.base import NamedParam
from memopt.partitions.deepspeed.fragments import Origin


def of_vectors(
    source: Source, origins: Sequence[Origin], entries: Sequence[NamedParam], groups: Sequence[dict[str, Any]]
) -> Source:
    """``source`` for an optimizer of these ``groups`` whose parameters are the vectors ``entries``, made of parts of
    ``origins``. Elements of a vector that are of no parameter are zero.

    Raises ValueError where a parameter is missing, and where those of one group were saved with different
    hyperparameters.
    """
    trained = [one for one in origins if one.flat is not None]
    by_name = _by_name(source, trained)
    records = {}
    for name, p, _ in entries:
        members = [one for one in trained if one.flat is p and one.spans[one.rank].numel]
        records[name] = _record(name, p.numel(), [(one, by_name[one.name]) for one in members])
    names = [[name for name, _, of in entries if of is group] for group in groups]
    return _like(source, records, names, _hyper(source, trained, by_name, groups), named=False)


def of_fragments(source: Source, origins: Sequence[Origin], groups: Sequence[dict[str, Any]]) -> Source:
    """``source`` for an optimizer of these ``groups`` that steps the rows behind the vectors. Parameters that are not
    trained have no state. Raises ValueError as :func:`of_vectors`."""
    trained = [one for one in origins if one.flat is not None]
    by_name = _by_name(source, trained)
    records = {}
    for one in origins:
        found = by_name.get(one.name) or Record(one.name, one.shape, stepped=False)
        records[one.name] = replace(found, name=one.name)
    names = [[one.name for one in origins if one.group is group] for group in groups]
    return _like(source, records, names, _hyper(source, trained, by_name, groups), named=True)


def _like(
    source: Source, records: dict[str, Record], names: list[list[str]], hyper: list[dict[str, Any]], *, named: bool
) -> Source:
    groups = [SavedGroup(some, h) for some, h in zip(names, hyper, strict=True)]
    return replace(source, groups=groups, records=records, named=named)


def _hyper(
    source: Source, origins: Sequence[Origin], by_name: Mapping[str, Record], groups: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What each of the optimizer's groups was saved with."""
    saved = {name: group.hyper for group in source.groups for name in group.names}
    found = []
    for group in groups:
        same = [saved[by_name[one.name].name] for one in origins if one.group is group]
        if any(h != same[0] for h in same):
            raise ValueError(f"{source.origin}: parameters of one group here were saved with different hyperparameters")
        found.append(dict(same[0]) if same else {})
    return found


def _by_name(source: Source, origins: Sequence[Origin]) -> Mapping[str, Record]:
    """The record of each parameter by the name that it has here; by place where the source has numbers."""
    names = [one.name for one in origins]
    if not source.named:
        if len(names) != len(source.records):
            raise ValueError(
                f"{source.origin} has state of {len(source.records)} parameters, here there are {len(names)}"
            )
        return dict(zip(names, source.records.values(), strict=True))
    theirs, ours = matching(list(source.records), names)
    by_name = dict(zip(theirs, source.records.values(), strict=True))
    for name, of, one in zip(names, ours, origins, strict=True):
        if of not in by_name:
            raise ValueError(f"{source.origin} has no parameter {name!r}; both must have the same parameters")
        if by_name[of].stepped and by_name[of].shape != one.shape:
            raise ValueError(f"{source.origin}: {name} is {list(by_name[of].shape)}, and {list(one.shape)} here")
    return {name: by_name[of] for name, of in zip(names, ours, strict=True)}


def _record(name: str, numel: int, members: Sequence[tuple[Origin, Record]]) -> Record:
    stepped = [record for _, record in members if record.stepped]
    if not stepped:
        return Record(name, (numel,), stepped=False, dtype="float32")
    moments = {}
    for moment in dict.fromkeys(moment for record in stepped for moment in record.moments):
        parts = [(origin, record.moments[moment]) for origin, record in members if moment in record.moments]
        moments[moment] = gathered(moment, (numel,), _gather(parts))
    return Record(name, (numel,), max(record.step for record in stepped), moments, dtype="float32")


def _gather(parts: Sequence[tuple[Origin, Stored]]) -> Gather:
    def gather(first: int, stop: int) -> Tensor:
        found = torch.zeros(stop - first)
        for origin, stored in parts:
            span = origin.spans[origin.rank]
            low, high = max(first, origin.at), min(stop, origin.at + span.numel)
            if low < high:
                begin = span.start - origin.at
                found[low - first : high - first] = elements(stored.decode, stored.shape, low + begin, high + begin)
        return found

    return gather


def elements(rows_of: Callable[[Rows], Tensor], shape: Shape, start: int, stop: int) -> Tensor:
    """Elements of a flattened parameter, from the rows that have them."""
    cols = max(Rows.whole(shape).cols, 1)
    rows = Rows(shape, start // cols, -(-stop // cols))
    begin = rows.first * cols
    return rows_of(rows).reshape(-1)[start - begin : stop - begin].cpu()
