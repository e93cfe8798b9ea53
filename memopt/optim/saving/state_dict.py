"""``state_dict()``: torch.optim's dictionary with what is needed to tell whether it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memopt.formats.base import CODES
from memopt.optim.edits.param_groups import has_shape
from memopt.optim.saving.dtensors import wrapped

if TYPE_CHECKING:
    from memopt.optim.params import Params


def packed(params: Params) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """State and groups with numbers for parameters, as torch.optim has them; what is under another key stays there.
    State of parameters that are in no group any more is the process's alone."""
    numbers = {id(p): i for i, (_, p, _) in enumerate(params.entries())}  # which puts names right, too
    groups = [{**g, "params": [numbers[id(p)] for p in g["params"]]} for g in params.owner.param_groups]
    state = {
        numbers[id(key)] if isinstance(key, Tensor) else key: value
        for key, value in params.owner.state.items()
        if not isinstance(key, Tensor) or id(key) in numbers
    }
    return state, groups


def dump(params: Params, skipped_steps: int, whole: Mapping[int, Any] | None = None) -> dict[str, Any]:
    """torch.optim's dictionary with what is needed to tell whether it fits. ``whole`` is the state of all ranks, by the
    parameters' numbers, in the place of this rank's."""
    setup = params.setup
    state, groups = packed(params)
    if whole is None:
        state = wrapped(setup.spec, setup.partition, params.entries(), state)
    else:
        state = {**{key: x for key, x in state.items() if not isinstance(key, int)}, **whole}
    cut = setup.partition.cut()
    rank, world = (0, 1) if whole is not None else (setup.partition.rank, setup.partition.world_size)
    return {
        "state": state,
        "param_groups": groups,
        "memopt": {
            "spec": str(setup.spec),
            "rank": rank,
            "world_size": world,
            "seed": setup.seed,
            "skipped_steps": skipped_steps,
            **described(params),
            **({} if cut is None else {"cut": cut}),
        },
    }


def described(params: Params) -> dict[str, str]:
    """What another spec must know to read the state, each as one string, which every tool that saves keeps as it is.
    What DeepSpeed's vectors are is known to the stage that cut them alone."""
    spec = params.setup.spec
    parameters = [
        [name, str(p.dtype).removeprefix("torch."), list(p.shape)] for name, p, _ in params.entries() if has_shape(p)
    ]
    whole = len(parameters) == len(list(params.entries()))  # else a lazy module has not seen data, nor stepped
    whole = whole and params.setup.partition.cut() is None
    return {
        "engine": spec.engine,
        "codes": CODES,
        "overrides": json.dumps(dict(spec.overrides)),
        **({"parameters": json.dumps(parameters)} if whole else {}),
    }


def described_parameters(saved: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and global shape of each parameter, in the groups' order, from what :func:`described` wrote."""
    return [(str(name), str(dtype), tuple(map(int, shape))) for name, dtype, shape in json.loads(saved["parameters"])]
