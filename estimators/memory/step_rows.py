"""The rows of a training step: activations, gradients, temporaries and the runtime, by phase."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from collections.abc import Callable
from typing import TYPE_CHECKING

from estimators.hardware import plain_name
from estimators.memory.memory_row import GPU, PHASES, PINNED, Row
from estimators.models.model import Model, Shape
from estimators.parallel.degrees import several
from estimators.training import Training

if TYPE_CHECKING:
    from estimators.activations import Activations, Network, Step
    from estimators.activations.scope import Parameters

    Part = Callable[[Network, Step], Network]

#: Cards before Ampere: torch's flash kernel does not run on them, and the memory-efficient one knows no grouped heads.
WITHOUT_FLASH = ("t4", "p100", "v10016gb", "v10032gb", "gtx1080ti", "rtx2080ti")


def run(
    model: Model, training: Training, sharded: bool = False, card: str = "", part: "Part | None" = None
) -> "tuple[Activations | None, str]":
    """The activations of a step, or None and why they are not known. ``sharded``: FSDP2 has its own mixed precision.
    ``part`` makes the network of a stage."""
    if model.module is not None or model.head:
        if several(training) and training.tp * training.pp * training.cp * training.ep > 1:
            return None, "activations (a traced step is that of the whole model; there is no formula of a part)"
        from estimators.traced.source import traced

        return traced(model, training, sharded)
    if model.config is None:
        return None, "activations (only shapes are known; name an architecture or a config.json)"
    from estimators.activations import EXPERTS, MIXED, NOT_SELECTIVE, PACKED, SPLIT, Step, activations, written

    if not written(str(model.config.get("model_type"))):
        return None, f"activations (there is no formula for {model.config.get('model_type')} yet)"
    for degree, known in (("tp", SPLIT), ("cp", SPLIT), ("ep", EXPERTS), ("packed", PACKED)):
        if int(getattr(training, degree)) > (degree != "packed") and model.config["model_type"] not in known:
            return None, f"activations (there is no formula for {model.config['model_type']} under {degree} yet)"
    selective = training.checkpointing.startswith("selective")
    refused = NOT_SELECTIVE.get(str(model.config["model_type"])) if selective else None
    if refused:
        return None, f"activations (torch refuses selective checkpointing of this model: {refused})"
    autocast = bool(training.mixed) and not sharded
    if autocast and model.config.get("model_type") not in MIXED:
        return None, "activations (there is no formula for it under autocast yet)"
    computed = "bfloat16" if training.mixed and sharded else None  # FSDP2 casts what it gathers
    entries = [
        (
            name,
            shape,
            computed if computed and ".lora_" not in name else model.dtypes.get(name, "bfloat16"),
            name not in model.frozen,
        )
        for name, shape in model.shapes
    ]
    item = 4 if entries and entries[0][2] == "float32" else 2
    step = Step(
        training.batch,
        training.seq // training.cp,
        training.attention,
        item,
        training.lora,
        training.device == "cpu",
        2 * autocast,
        training.lora_dropout,
        training.outputs == "kept",
        training.loss,
        training.float8,
        training.offload_activations,
        plain_name(card) in WITHOUT_FLASH,
        training.of.copies_logits,
        training.of.saves_quantised_input,
        training.tp,
        training.cp,
        training.ep,
        training.regather,
        training.packed,
        not training.of.checkpoints_reentrantly,
    )
    try:
        parameters = _parameters(model, entries)
        return activations(model.config, model.name, step, training.checkpointing, parameters, part), ""
    except KeyError as error:
        return None, f"activations (there is no formula for {error.args[0]!r} yet)"


#: Of the last model: many estimates of one follow each other.
_LAST: "list[tuple[Model, list[tuple[str, Shape, str, bool]], Parameters]]" = []


def _parameters(model: Model, entries: "list[tuple[str, Shape, str, bool]]") -> "Parameters":
    from estimators.activations.scope import parameters

    if not (_LAST and _LAST[0][0] is model and _LAST[0][1] == entries):
        _LAST[:] = [(model, entries, parameters(entries))]
    return _LAST[0][2]


def rows(
    name: str,
    model: Model,
    training: Training,
    ran: "Activations",
    gradients: list[tuple[str, int]],
    known: str,
    few: list[Row] | None,
    at_once: bool = False,
) -> list[Row]:
    """Activations and gradients by phase; ``few`` are the rows of gradients that do not stay; ``at_once``: each goes as
    soon as it is made."""
    forward, loss = ran.forward.activations - ran.body_copies, ran.loss.activations - ran.copies
    held = [
        Row(name, "weights", "autocast's copies", n, GPU, (phase,), "formula")
        for phase, n in (("forward", ran.body_copies), ("loss", ran.copies))
        if n
    ]
    kept, activations = ran.kept or ran, "activations"  # at most the model's output is there too
    held += [
        Row(name, activations, "saved, and the layer at work", forward, GPU, ("forward",), "formula"),
        Row(name, activations, "saved, and the loss", loss, GPU, ("loss",), "formula"),
    ]
    if at_once and few:
        alive, made = ran.released
        largest = max(made, sum(row.nbytes for row in few))
        most = max(alive, kept.accumulated.activations)
        held.append(few[0]._replace(nbytes=made, provenance="formula", low=made, high=largest))
    elif few is not None or training.gradients_stay:
        alive = ran.accumulated.activations  # the moment that has most, whatever gradients there are
        most = kept.accumulated.activations
        held += (
            few
            if few is not None
            else [Row(name, "gradients", kind, n, GPU, PHASES[1:], known) for kind, n in gradients]
        )
    else:
        alive, total = ran.backward.activations, sum(n for _, n in gradients)
        made = min(ran.backward.gradients, total)
        most = max(alive, sum(kept.backward) - ran.backward.gradients)
        held.append(Row(name, "gradients", "made at that moment", made, GPU, ("backward",), "formula"))
        held += [Row(name, "gradients", kind, n, GPU, ("step",), known) for kind, n in gradients]
    high = most if most > alive else None
    held.append(
        Row(name, activations, "left, and at work", alive, GPU, ("backward",), "formula", alive if high else None, high)
    )
    if ran.away:
        held.append(Row(name, activations, "offloaded", ran.away, PINNED, PHASES[1:4], "formula"))
    if kept.output:
        output = ran.output
        held.append(
            Row(name, activations, "the model's output", output, GPU, ("step",), "formula", output, kept.output)
        )
    return held


def one_gradient(name: str, gradients: list[tuple[str, int]], known: str) -> list[Row]:
    """Gradients that are released: those that are there at a time, in the backward pass alone."""
    return [Row(name, "gradients", f"{kind}, one at a time", n, GPU, ("backward",), known) for kind, n in gradients]


def released(model: Model, here: Model, nbytes: Callable[[str, Shape], tuple[str, int]]) -> list[tuple[str, int]]:
    """The dtype and bytes of gradients that are there at a time: the largest one. ``here`` is the model with the rows
    of this rank.

    That of an embedding which is also the head's weight waits for its other half until the end of the backward pass,
    where autograd holds both halves and their sum. FSDP2 hands over the gradients of a block together.
    """
    each = [(name, *nbytes(name, shape)) for name, shape in here.shapes if name not in here.frozen]
    if not each:
        return []
    if here is not model:
        from estimators.memory.sharding import largest_block

        return [(max(kind for _, kind, _ in each), largest_block((name, n) for name, _, n in each))]
    shared = tied(model)
    table = max((n for name, _, n in each if name == shared), default=0)
    most = max((3 * n if name == shared else n + table, kind) for name, kind, n in each)
    return [(most[1], most[0])]


def tied(model: Model) -> str | None:
    """The embedding that is the head's weight too: a table of the vocabulary that is there once."""
    vocabulary = (model.config or {}).get("vocab_size")
    tables = [name for name, shape in model.shapes if len(shape) == 2 and shape[0] == vocabulary]
    return tables[0] if len(tables) == 1 else None
