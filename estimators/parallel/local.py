"""What one rank holds of a model whose parameters are cut by tensor and expert parallelism, and between stages."""

from __future__ import annotations

from estimators.errors import InputError
from estimators.memory.sharding import block_of
from estimators.models.model import Model
from estimators.training import Training


def cut(model: Model, training: Training) -> Model:
    """The model with the shapes of the first of ``tp`` and ``ep`` ranks. Raises :class:`InputError`."""
    if training.tp == 1 and training.ep == 1:
        return model
    model.known(f"{f'tp={training.tp}' if training.tp > 1 else f'ep={training.ep}'} cuts parameters by their names")
    from memopt.core.hyperparameters import SpecError
    from memopt.layout.model_parallel import cuts

    whole = dict(model.shapes)
    try:
        found = cuts(whole, training.tp, training.ep)
    except SpecError as error:
        raise InputError(f"{model.name}: {error}") from None
    if training.ep > 1 and not any(one.ranks > 1 for one in found.values()):
        raise InputError(f"ep={training.ep} is for experts that are stacked in a parameter, and {model.name} has none")
    if training.tp > 1 and not found:
        raise InputError(f"tp={training.tp}: no parameter of {model.name} has a name that tensor parallelism knows")
    return model._replace(
        shapes=tuple((name, found[name].local(shape) if name in found else shape) for name, shape in model.shapes),
        uncut={name: whole[name] for name in found},
        cuts=found,
        degrees=(training.tp, training.ep),
    )


class Stage:
    """The chunks of layers ``[start, stop)`` of one rank of the pipeline, and whether it has the model's ends."""

    __slots__ = ("chunks", "layers", "rank", "stages")

    def __init__(self, rank: int, stages: int, chunks: int, layers: int) -> None:
        self.rank, self.stages, self.layers = rank, stages, layers
        bounds = splits(layers, stages * chunks)
        self.chunks = [(bounds[c * stages + rank], bounds[c * stages + rank + 1]) for c in range(chunks)]

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.stages - 1

    def describe(self) -> str:
        runs = ", ".join(f"{start} to {stop - 1}" if stop > start else "none" for start, stop in self.chunks)
        ends = " with the embedding" if self.first else " with the head" if self.last else ""
        return f"rank {self.rank} of {self.stages} of the pipeline, layers {runs}{ends}"


def splits(layers: int, stages: int) -> list[int]:
    """Where each stage's layers begin; the last is their number. Of layers that do not come out even, stages between
    the first and the last have one more, because those have the ends (torchtitan's split).

    >>> splits(126, 8)
    [0, 15, 31, 47, 63, 79, 95, 111, 126]
    """
    each, more = divmod(layers, stages)
    sizes = [each] * stages
    for i in [*range(1, stages - 1), stages - 1, 0][:more]:
        sizes[i] += 1
    found = [0]
    for size in sizes:
        found.append(found[-1] + size)
    return found


def candidates(model: Model, training: Training) -> list[Stage]:
    """Ranks of the pipeline among which the fullest is looked for: both ends, and the second, which may have a layer
    more than the first. Raises :class:`InputError`."""
    from estimators.parallel.degrees import chunks

    layers = len(blocks(model))
    stages, each = training.pp, chunks(training)
    if layers < stages * each:
        raise InputError(
            f"pp={stages} with {each} chunk(s) of layers a rank needs {stages * each} layers; {model.name} has {layers}"
        )
    return [Stage(rank, stages, each, layers) for rank in sorted({0, 1, stages - 1})]


def blocks(model: Model) -> list[str]:
    return list(dict.fromkeys(filter(None, (block_of(name) for name, _ in model.shapes))))


def staged(model: Model, stage: Stage, chunk: int | None = None) -> Model:
    """The parameters of a rank, or of one of its chunks. Of a tied model the last rank has a copy of the embedding."""
    from estimators.memory.step_rows import tied

    of = {name: i for i, name in enumerate(blocks(model))}
    runs = stage.chunks if chunk is None else [stage.chunks[chunk]]
    starts = stage.first and chunk in (None, 0)
    ends = stage.last and chunk in (None, len(stage.chunks) - 1)
    shared, before = tied(model), True
    kept = []
    for name, shape in model.shapes:
        block = block_of(name)
        before = before and not block
        here = any(start <= of[block] < stop for start, stop in runs) if block else starts if before else ends
        if here or (ends and name == shared):
            kept.append((name, shape))
    return model._replace(shapes=tuple(kept))
