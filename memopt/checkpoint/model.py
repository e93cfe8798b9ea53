"""A saved model into a model that is here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memopt.checkpoint import contents
from memopt.checkpoint.opened import Checkpoint


def plan_model(checkpoint: Checkpoint, model: torch.nn.Module) -> Callable[[], None]:
    """What loads it. Raises ValueError for a name that one of them does not have, another shape or another dtype."""
    file = checkpoint.model
    if file is None:
        raise ValueError(f"{checkpoint.path} holds no model")
    tied = checkpoint.body["model"]["tied"]
    here, _ = contents.model_tensors(model)
    everything = contents.unwrapped(model).state_dict()
    saved = {**{name: name for name in file.specs}, **tied}
    for name in (*saved, *everything):
        if name not in everything or name not in saved:
            who = "the model" if name in saved else f"{file.path}"
            raise ValueError(f"{who} has no tensor {name!r}; the model must be the one that was saved")
        spec, tensor = file.specs[saved[name]], everything[name]
        found = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if found != tuple(spec):
            raise ValueError(f"{name} is {found[0]} {found[1]}, and {spec.dtype} {spec.shape} was saved")

    def apply() -> None:
        for name, tensor in here.items():
            file.read_into(saved[name], None, tensor)

    return apply
