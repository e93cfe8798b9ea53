"""A saved model into a model that is here, whole or sharded, whatever it was when it was saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.io import contents
from memopt.checkpoint.opened import Checkpoint
from memopt.checkpoint.partial_load import alike, notes
from memopt.checkpoint.state.slabs import ColumnSlices, here
from memopt.checkpoint.tensorfile import spec_of
from memopt.core.param_names import matching
from memopt.core.rows import Rows
from memopt.partitions.dtensor import is_dtensor, local_rows


def plan_model(checkpoint: Checkpoint, model: torch.nn.Module) -> Callable[[], None]:
    """What loads it. Raises ValueError for a name that one of them does not have, another shape or another dtype."""
    file = checkpoint.model
    if file is None:
        raise ValueError(f"{checkpoint.path} holds no model")
    tied = checkpoint.body["model"]["tied"]
    tensors, _ = contents.model_tensors(model)
    everything = contents.named_state(model)
    specs = checkpoint.model_specs
    saved = {**{name: name for name in specs}, **tied}
    theirs, ours = matching(list(saved), list(everything))
    saved = dict(zip(theirs, saved.values(), strict=True))
    everything = dict(zip(ours, everything.values(), strict=True))
    tensors = dict(zip(matching(list(saved), list(tensors))[1], tensors.values(), strict=True))
    for name in (*saved, *everything):
        if name not in everything or name not in saved:
            who = "the model" if name in saved else f"{file.path}"
            raise ValueError(f"{who} has no tensor {name!r}; the model must be the one that was saved")
        spec, found = specs[saved[name]], spec_of(everything[name])
        if found != spec:
            raise ValueError(f"{name} is {found.dtype} {found.shape}, and {spec.dtype} {spec.shape} was saved")

    def apply() -> None:
        for name, tensor in tensors.items():
            checkpoint.read_model(saved[name], *_target(name, tensor))

    return apply


def plan_common(checkpoint: Checkpoint, model: torch.nn.Module) -> tuple[Callable[[], None], list[str]]:
    """What loads the tensors and rows that both have, and what it says of them. Raises ValueError for another dtype."""
    if checkpoint.model is None:
        raise ValueError(f"{checkpoint.path} holds no model")
    tensors, tied = contents.model_tensors(model)
    specs = checkpoint.model_specs
    names = {**{name: name for name in specs}, **checkpoint.body["model"]["tied"]}
    for name, tensor in tensors.items():
        if name in names and specs[names[name]].dtype != spec_of(tensor).dtype:
            raise ValueError(f"{name} is {spec_of(tensor).dtype}, and {specs[names[name]].dtype} was saved")
    saved = {name: tuple(specs[of].shape) for name, of in names.items() if name not in tied}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    both = [
        name for name in tensors if name in saved and (saved[name] == shapes[name] or alike(saved[name], shapes[name]))
    ]

    def apply() -> None:
        for name in both:
            rows, tensor, columns = _target(name, tensors[name])
            if saved[name] == shapes[name]:
                checkpoint.read_model(names[name], rows, tensor, columns)
                continue
            start, stop = rows.bounds
            stop = min(stop, saved[name][0])
            if start < stop:
                part = Rows(saved[name], start, stop, 1)
                checkpoint.read_model(names[name], part, tensor[: stop - start], columns)

    return apply, notes("model", saved, shapes, "as it is here")


def _target(name: str, tensor: Any) -> tuple[Rows, Tensor, ColumnSlices]:
    """The rows that are here, their memory, and which columns of them, where it is not all."""
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
        return Rows.whole(shape), tensor, ()
    slab, rows = here(tensor, 0), local_rows(name, tensor).rows
    rows = Rows(shape, *rows.bounds, 1) if shape else rows
    return rows, tensor.to_local(), slab.columns() if slab.size[1:] != shape[1:] else ()
