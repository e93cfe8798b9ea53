"""Whether stored moments are plausible: NaN, Inf, zeros, dead blocks, and how their sizes are spread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from memopt.checkpoint.state.moment_codes import CHUNK_NUMEL, chunks
from memopt.checkpoint.state.saved import Source, Stored
from memopt.core.rows import Rows


@dataclass
class Health:
    """Sums over all tensors of one moment in one format. ``decades[i]`` counts 1e(FIRST + i) <= |x| < ten times that;
    what is smaller or larger is in the first or the last."""

    FIRST: ClassVar[int] = -24
    LAST: ClassVar[int] = 4

    name: str
    format: str
    tensors: int = 0
    numel: int = 0
    nbytes: dict[str, int] = field(default_factory=dict)
    non_finite: int = 0
    zeros: int = 0
    scales: int = 0
    zero_scales: int = 0
    worst: list[str] = field(default_factory=list)
    decades: list[int] = field(default_factory=lambda: [0] * (Health.LAST - Health.FIRST))

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "first_decade": self.FIRST}


@torch.no_grad()
def examine(source: Source, progress: Callable[[int], None] = lambda nbytes: None) -> list[Health]:
    """One entry for each moment and format, a few megabytes decoded at a time. ``progress`` is told the bytes of each
    tensor that is done."""
    found: dict[tuple[str, str], Health] = {}
    for record in source.records.values():
        for name, stored in record.moments.items():
            code = stored.code or stored.format.name
            progress(_add(found.setdefault((name, code), Health(name, code)), record.name, stored))
        if record.master is not None:
            stored = record.master.stored
            name = stored.moment.name
            _add(found.setdefault((name, ""), Health(name, record.master.stored.format.name)), record.name, stored)
    return list(found.values())


def _add(health: Health, parameter: str, stored: Stored) -> int:
    """Counts one tensor's numbers in; returns its bytes."""
    before_nbytes = sum(health.nbytes.values())
    rows = Rows.whole(stored.shape)
    health.tensors += 1
    sparse = _stands_for_more(stored, rows)
    health.numel += sum(part.numel() for part in _parts_of(stored, rows)) if sparse else rows.numel
    for part, (nbytes, scales) in _parts(stored, rows).items():
        health.nbytes[part] = health.nbytes.get(part, 0) + nbytes
        if scales is not None:
            health.scales += scales.numel()
            health.zero_scales += int((scales == 0).sum())
    before = health.non_finite
    for values in _values(stored, rows):
        size = values.abs()
        finite = size.isfinite()
        health.non_finite += int((~finite).sum())
        health.zeros += int((size == 0).sum())
        decades = size[finite & (size > 0)].log10().floor().clamp_(health.FIRST, health.LAST - 1)
        counts = torch.bincount((decades - health.FIRST).long(), minlength=len(health.decades))
        health.decades = [a + b for a, b in zip(health.decades, counts.tolist(), strict=True)]
    if health.non_finite > before:
        health.worst.append(parameter)
    return sum(health.nbytes.values()) - before_nbytes


def _values(stored: Stored, rows: Rows) -> Iterator[Tensor]:
    """What is examined: the moment, decoded, or the numbers that it is made of where those are far fewer (means of rows
    and columns): the time this takes is that of reading them."""
    if _stands_for_more(stored, rows):
        for part in _parts_of(stored, rows):
            yield from part.reshape(-1).split(CHUNK_NUMEL)
        return
    for piece in chunks(rows):
        yield stored.decode(piece)


def _stands_for_more(stored: Stored, rows: Rows) -> bool:
    numbers = sum(prod(spec.shape) for spec in stored.format.layout(stored.moment, rows).values())
    return rows.numel > 4 * numbers + CHUNK_NUMEL


def _parts_of(stored: Stored, rows: Rows) -> list[Tensor]:
    return [stored.part(part, rows).float() for part in stored.format.layout(stored.moment, rows)]


def _parts(stored: Stored, rows: Rows) -> dict[str, tuple[int, Tensor | None]]:
    """part -> its bytes, and the tensor where that is of scales."""
    if stored.coded is not None:
        return {part: (t.nbytes, t if part == "scales" else None) for part, t in stored.coded.items()}
    return {
        part: (spec.nbytes, stored.part(part, rows) if part == "scales" else None)
        for part, spec in stored.format.layout(stored.moment, rows).items()
    }
