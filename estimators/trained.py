"""A model as a step trains it: the dtypes of its weights, which of them train, and adapters beside them."""

from __future__ import annotations

from estimators.errors import InputError, shown
from estimators.models.lora import NF4
from estimators.models.model import Model
from estimators.training import Training, notes

#: The last model, what was asked of it, and the answer: many estimates of one model follow each other.
_LAST: list[tuple[Model, tuple[object, ...], Model]] = []


def as_trained(model: Model, training: Training, weights: str | None) -> Model:
    """``weights``: the dtype of the model's own weights; None: its own, or bfloat16. Raises :class:`InputError`."""
    said = notes(model.config, training)
    asked = (training.adapters if training.lora else None, training.frozen, training.train, weights, said)
    if not (_LAST and _LAST[0][0] is model and _LAST[0][1] == asked):
        _LAST[:] = [(model, asked, _made(model._replace(notes=(*model.notes, *said)), training, weights))]
    return _LAST[0][2]


def _made(model: Model, training: Training, weights: str | None) -> Model:
    if weights:
        # Quantised weights and adapters of a live module have dtypes of their own.
        fixed = {n: kind for n, kind in model.dtypes.items() if kind in NF4 or ".lora_" in n}
        model = model._replace(dtypes={**{name: weights for name, _ in model.shapes}, **fixed})
    if training.lora:
        if any(".lora_" in name for name, _ in model.shapes):
            raise InputError("the model has adapters already; leave out lora")
        from estimators.models.lora import with_adapters

        return with_adapters(model, training.lora, training.quantised, training.adapters)
    if training.frozen or training.train:
        return _frozen(model, training)
    return model


def _frozen(model: Model, training: Training) -> Model:
    """Patterns, separated by commas, are matched as a shell matches file names; one without ``*`` or ``?`` matches
    every name that contains it."""
    from fnmatch import fnmatchcase

    what = "frozen" if training.frozen else "train"
    model.known(f"{what}={shown(training.frozen or training.train)} goes by names of parameters")
    patterns = [p for p in (training.frozen or training.train).replace(",", " ").split() if p]
    names = [name for name, _ in model.shapes]
    matched: set[str] = set()
    for pattern in patterns:
        wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
        found = {name for name in names if fnmatchcase(name, wild)}
        if not found:
            raise InputError(f"{what}={shown(pattern)} matches no parameter; names are like {', '.join(names[:4])}")
        matched |= found
    frozen = model.frozen | (matched if what == "frozen" else set(names) - matched)
    if len(frozen) == len(names):
        raise InputError(f"{what}={shown(training.frozen or training.train)} leaves nothing to train")
    return model._replace(frozen=frozenset(frozen))
