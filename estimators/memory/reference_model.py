"""The second model of preference training (DPO and its kin): frozen weights, and a forward pass that keeps nothing.

TRL asks it after the policy's forward pass and before the loss, when all that the policy saved is there. The loss
itself is priced as cross-entropy over the same tokens. ``batch`` counts sequences: a pair of chosen and rejected is
two.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from estimators.errors import InputError
from estimators.memory.memory_row import GPU, PHASES, Row
from estimators.models.model import Model
from estimators.models.resolve import resolve
from estimators.training import Training

if TYPE_CHECKING:
    from estimators.activations import Activations

#: ``reference_model``: a frozen copy of the model that trains.
SAME = "same"


def reference(model: Model, training: Training, weights: str | None) -> tuple[Model, Activations | None] | None:
    """The frozen model and its forward pass (None where that is not known); None where there is no second model.
    ``model``: the one that trains, as it was given. Raises :class:`InputError`."""
    if not training.reference_model:
        return None
    if training.lora:
        raise InputError(
            "reference_model does not go with lora: TRL's reference is the model itself with its adapters switched off"
        )
    from estimators.memory.step_rows import run

    second = model if training.reference_model == SAME else resolve(training.reference_model)
    dtypes = dict.fromkeys((name for name, _ in second.shapes), weights) if weights else second.dtypes
    second = second._replace(frozen=frozenset(name for name, _ in second.shapes), dtypes=dtypes)
    alone = training._replace(checkpointing="none", outputs="dropped", accumulate=1, frozen="", train="")
    return second, run(second, alone)[0] if training.seq else None


def rows(name: str, second: tuple[Model, Activations | None], ran: Activations | None, ranks: int) -> list[Row]:
    """``ran``: the policy's activations. ``ranks``: over how many the weights are cut (1: each has all)."""
    from memopt.core.ledger import ITEMSIZE

    model, forward = second
    nbytes = sum(prod(shape) * ITEMSIZE[model.dtypes.get(n, "bfloat16")] for n, shape in model.shapes)
    found = [Row(name, "weights", "the reference model's", -(-nbytes // ranks), GPU, PHASES, model.provenance)]
    if ran and forward:
        alive = ran.saved + max(forward.forward.activations, forward.loss.activations)
        more = max(0, alive - ran.loss.activations)
        found.append(Row(name, "activations", "the reference's forward pass", more, GPU, ("loss",), "formula"))
    return found
