"""The columns of an estimate: for each spec the rows of the fullest rank, and what they do not contain."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from estimators.memory.rank_memory import rows_of, step_temporaries
from estimators.models.model import Model
from estimators.parallel.degrees import check_partition, sharing
from estimators.result import Column
from estimators.training import Training, unknown
from memopt.partitions import PARTITIONS

if TYPE_CHECKING:
    from estimators.activations import Activations
    from memopt.spec import OptimSpec

#: What an estimate without activations does not contain.
WITHOUT = ("temporaries of the step", "CUDA context", "allocator rounding")


class ColumnRequest(NamedTuple):
    """What holds for all columns. ``card``: its name, where that was given. ``second``: the reference model of
    preference training, and its forward pass."""

    training: Training
    world_size: int
    gradients: "str | None"
    card: str
    second: "tuple[Model, Activations | None] | None"
    given: Any


class Columns(NamedTuple):
    """``ran``: the activations of the first column. ``model``: as it was given, with notes."""

    columns: list[Column]
    ran: "Activations | None"
    model: Model


def columns(model: Model, specs: "Sequence[OptimSpec]", asked: ColumnRequest) -> Columns:
    """``model`` is as it trains. Raises :class:`InputError`."""
    training = asked.training
    shards = sharing(training, asked.world_size)
    for spec in specs:
        check_partition(training, spec.partition, spec)
    ranks = _ranks(model, training)
    found: list[Column] = []
    first = None
    for spec in specs:
        best = max((_column(one, spec, asked, shards) for one in ranks), key=lambda c: c[0].process.high)
        found.append(best[0])
        first = first or best
    assert first is not None
    notes = (*model.notes, *(first[1].notes if first[1] else ()), *((first[2],) if first[2] else ()))
    return Columns(found, first[1], model._replace(notes=notes))


class _Rank:
    """One rank's part of the model; its activations by who computes in 16 bits are found once."""

    def __init__(self, model: Model, training: Training, stage: Any = None) -> None:
        self.whole, self.training, self.stage, self.model = model, training, stage, model
        if stage is not None:
            from estimators.parallel.local import staged

            self.model = staged(model, stage)
        self._known: dict[bool, tuple[Activations | None, str]] = {}

    def activations(self, own_precision: bool, card: str) -> "tuple[Activations | None, str]":
        if not self.training.seq:
            return None, "activations (say --seq)"
        if own_precision not in self._known:
            from estimators.memory.step_rows import run

            if self.stage is None:
                self._known[own_precision] = run(self.model, self.training, own_precision, card)
            else:
                from estimators.parallel.pipeline import activations

                self._known[own_precision] = activations(
                    self.whole,
                    self.stage,
                    self.training,
                    lambda model, part: run(model, self.training, own_precision, card, part),
                )
        return self._known[own_precision]


def _ranks(model: Model, training: Training) -> list[_Rank]:
    """Those among which the fullest is looked for."""
    if training.pp == 1:
        return [_Rank(model, training)]
    from estimators.parallel.local import candidates

    return [_Rank(model, training, stage) for stage in candidates(model, training)]


def _column(
    rank: _Rank, spec: "OptimSpec", asked: ColumnRequest, shards: int
) -> "tuple[Column, Activations | None, str]":
    training, model = rank.training, rank.model
    ran, missing = rank.activations(own_precision(spec, training), asked.card)
    without = (missing, *(() if training.seq else WITHOUT)) if missing else ()
    without += (*unknown(training), *model.without)
    if asked.second and training.seq and asked.second[1] is None:
        without += ("the reference model's forward pass",)
    of_the_step = step_temporaries(model, spec, shards, None, training) if training.seq else 0
    if of_the_step is None and "temporaries of the step" not in without:
        without = (*without, "temporaries of the step")
    held = rows_of(model, spec, asked.gradients, shards, training, ran, of_the_step, asked.card, asked.second)
    if training.seq and training.device != "cpu" and str(spec) == "adamw":
        from estimators.memory.other_optimizers import foreach

        held += foreach(asked.given, spec, model)
    said = "" if rank.stage is None else f"bytes are those of {rank.stage.describe()}, the fullest"
    return Column(str(spec), held, spec.options, spec.hyper, without), ran, said


def own_precision(spec: "OptimSpec", training: Training) -> bool:
    """Whether mixed precision is FSDP2's, which computes in it throughout."""
    return bool(training.mixed) and PARTITIONS[spec.partition].shards_weights
