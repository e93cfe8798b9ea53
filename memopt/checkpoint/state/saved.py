"""Optimizer state at rest, wherever it is: in memory, in files of several ranks, in another tool's dictionary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from memopt.checkpoint.state.moment_codes import common, stored_rows
from memopt.core.rows import Rows, Shape
from memopt.formats import Format, Shard
from memopt.masters import Master
from memopt.rules import RULES, Moment, Rule
from memopt.spec import OptimSpec

#: A range along dimension 0; None is the whole tensor.
DimRange = tuple[int, int] | None


class SavedPiece(ABC):
    """The parts of one moment for some rows of a parameter. Subclasses are final."""

    rows: Rows

    @abstractmethod
    def read(self, part: str, span: DimRange) -> Tensor:
        """This range of a part; it must not be changed."""

    @abstractmethod
    def copy(self, part: str, span: DimRange, out: Tensor) -> None:
        """The same, into ``out``."""


@final
class LivePiece(SavedPiece):
    """Tensors in memory."""

    def __init__(self, rows: Rows, parts: Mapping[str, Tensor]) -> None:
        self.rows = rows
        self._parts = parts

    def read(self, part: str, span: DimRange) -> Tensor:
        return self._parts[part] if span is None else self._parts[part][slice(*span)]

    def copy(self, part: str, span: DimRange, out: Tensor) -> None:
        out.copy_(self.read(part, span))


class Stored(NamedTuple):
    """One moment of one parameter as it is stored: encoded by ``format``, its rows in one or more pieces. Where those
    are decoded from another tool's code as they are read, ``code`` names it and ``coded`` are its tensors."""

    moment: Moment
    format: Format
    shape: Shape
    pieces: tuple[SavedPiece, ...]
    code: str = ""
    coded: Mapping[str, Tensor] | None = None

    def part(self, part: str, rows: Rows) -> Tensor:
        """The part for these rows, assembled from the pieces; a view where one piece has them all."""
        if self.format.is_shared(self.moment, part, self.shape):
            return self.pieces[0].read(part, None)
        rows = stored_rows(self.format, self.moment, rows)
        found = [
            piece.read(part, self.format.span(self.moment, part, here, both))
            for piece, here in self._located()
            if (both := common(here, rows)) is not None
        ]
        if found:
            return found[0] if len(found) == 1 else torch.cat(found)
        spec = self.format.layout(self.moment, rows)[part]
        return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))

    def decode(self, rows: Rows) -> Tensor:
        """fp32 [rows.local_shape]; it must not be changed, it may be the state itself."""
        around = stored_rows(self.format, self.moment, rows)
        parts = {part: self.part(part, around) for part in self.format.layout(self.moment, around)}
        x = self.format.read(parts, self.moment, Shard(around))
        if around.bounds == rows.bounds:
            return x
        start, stop = rows.bounds
        return x[start - around.bounds[0] : stop - around.bounds[0]]

    def _located(self) -> list[tuple[SavedPiece, Rows]]:
        return [(piece, stored_rows(self.format, self.moment, piece.rows)) for piece in self.pieces]

    def copy(self, rows: Rows, parts: Mapping[str, Tensor]) -> None:
        """These rows, bit for bit, into parts of the same format."""
        rows = stored_rows(self.format, self.moment, rows)
        for part, target in parts.items():
            if self.format.is_shared(self.moment, part, self.shape):
                self.pieces[0].copy(part, None, target)
                continue
            for piece, piece_rows in self._located():
                both = common(piece_rows, rows)
                if both is not None:
                    there = self.format.span(self.moment, part, rows, both)
                    here = self.format.span(self.moment, part, piece_rows, both)
                    piece.copy(part, here, target if there is None else target[slice(*there)])


class SavedMaster(NamedTuple):
    """The tensor of one parameter's master. ``weights(rows)`` are the weights beside which it stands, None where they
    are not at hand."""

    master: Master
    dtype: str  # of the parameter
    stored: Stored
    weights: Callable[[Rows], Tensor] | None = None


@dataclass
class Record:
    """The state of one parameter; no moments where it has never been stepped. ``dtype`` is the parameter's, empty where
    that was not saved; ``master`` is what stands beside it; ``weights(rows)`` is the parameter itself, where it is at
    hand. ``own(rank)`` is what the user has put beside its state; ``state`` are the tensors of one in memory."""

    name: str
    shape: Shape
    step: float = 0.0
    moments: dict[str, Stored] = field(default_factory=dict)
    stepped: bool = True
    dtype: str = ""
    master: SavedMaster | None = None
    weights: Callable[[Rows], Tensor] | None = None
    own: Callable[[int], dict[str, Any]] | None = None
    state: Mapping[str, Any] | None = None


@dataclass
class SavedGroup:
    """The hyperparameters of some parameters, by name."""

    names: list[str]
    hyper: dict[str, Any]


@dataclass
class Source:
    """A saved optimizer. ``named`` says that names are the model's and not numbers; ``origin`` is where it is,
    ``label`` what wrote it where that was not memopt."""

    spec: OptimSpec
    groups: list[SavedGroup]
    records: dict[str, Record]
    origin: str
    named: bool = True
    seed: int | None = None
    skipped_steps: int | None = None
    label: str = ""
    others: dict[Any, Any] = field(default_factory=dict)  # state under keys that are no parameters

    @cached_property
    def _rules(self) -> dict[str, str]:
        return {name: self.spec.rule_of(group.hyper) for group in self.groups for name in group.names}

    def rule_of(self, name: str) -> Rule:
        """The rule of a parameter; of one that was not saved, the spec's."""
        return RULES[self._rules.get(name, self.spec.rule)]
