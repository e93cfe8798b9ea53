"""What goes into a checkpoint: tensors by file and name, and the plain rest for the manifest."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint.io import json_values
from memopt.checkpoint.state import slabs
from memopt.checkpoint.state.moment_codes import moment_codes
from memopt.core.param_names import clean_names
from memopt.layout.replaced_state import own_entries
from memopt.masters import MASTERS
from memopt.optim.edits.group_checks import is_named
from memopt.optim.edits.param_groups import has_shape
from memopt.partitions.dtensor import is_dtensor, local_rows
from memopt.partitions.fsdp import Sharded
from memopt.partitions.ranks import Ranks
from memopt.spec import OptimSpec
from memopt.version import __version__

if TYPE_CHECKING:
    from memopt.optimizer import Optimizer

MODEL_FILE = "model.safetensors"
RANDOM = "random/"
#: Before the name of a tensor of the model of which a rank's file has the rows.
SHARDED_MODEL = "model:"


def rank_file(rank: int, world_size: int) -> str:
    """The file of one rank's rows of optimizer state, and of its random state."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def written_by() -> dict[str, str]:
    return {"memopt": __version__, "torch": torch.__version__, "python": platform.python_version()}


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel, whose own names begin with ``module.``."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def named_state(model: torch.nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` without what wrappers put into names."""
    state = unwrapped(model).state_dict(keep_vars=True)
    return dict(zip(clean_names(state), state.values(), strict=True))


def model_tensors(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``(name -> tensor, name -> the name of the same tensor)``: a tied weight is kept once.

    Raises ValueError for what a file of tensors cannot hold: extra state that is no tensor, or another kind of tensor.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in named_state(model).items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} of the model is a {type(value).__name__}, not a tensor; memopt.save keeps tensors"
            )
        identity: Any = id(value)
        if not is_dtensor(value):
            value = value.detach()
            if type(value) is not Tensor:
                raise ValueError(
                    f"{name} of the model is a {type(value).__name__}; memopt.save keeps ordinary tensors and DTensors"
                )
            identity = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and identity in seen:
            tied[name] = seen[identity]
        else:
            seen[identity] = name
            tensors[name] = value
    return tensors, tied


def sharded_tensors(tensors: dict[str, Any]) -> dict[str, Any]:
    """The DTensors among the model's tensors. Raises RuntimeError where what a rank has of one is not one range."""
    found = {name: value for name, value in tensors.items() if is_dtensor(value)}
    for name, value in found.items():
        local_rows(name, value)
    return found


def add_slabs(body: dict[str, Any], ranks: Ranks, sharded: Mapping[str, Any], optimizer: Any) -> set[str]:
    """Say in the manifest where parameters are that are not cut by rows over all ranks. Returns what of this rank's
    file another rank writes. Every rank must call this."""
    parameters = dict[str, Any]()
    if optimizer is not None and isinstance(optimizer.partition, Sharded) and optimizer.partition.world_size > 1:
        parameters = {name: p for name, p, _ in optimizer.params.entries()}
    others: set[str] = set()
    of_model = slabs.together(ranks.gather, sharded, ranks.rank, ranks.world_size)
    of_state = slabs.together(ranks.gather, parameters, ranks.rank, ranks.world_size)
    for name, found in of_model.items():
        body["model"].setdefault("slabs", {})[name] = [list(slab) for slab in found]
        if ranks.rank not in {slab.rank for slab in found}:
            others.add(SHARDED_MODEL + name)
    for name, found in of_state.items():
        body["optimizer"]["parameters"][name]["slabs"] = [list(slab) for slab in found]
        if ranks.rank not in {slab.rank for slab in found}:
            others |= {f"{name}/{key}" for key in _layout_keys(optimizer, name, parameters[name])}
    return others


def _layout_keys(optimizer: Any, name: str, p: Tensor) -> list[str]:
    group = next(group for other, q, group in optimizer.params.entries() if q is p and other == name)
    state = optimizer.state.get(p, {})
    return [key for key in state if key not in own_entries(optimizer.spec.rule_of(group), state)]


def refuse_vectors(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer of DeepSpeed's vectors."""
    if optimizer.partition.is_flattened:
        raise ValueError(
            "the optimizer steps DeepSpeed's flat vectors, which memopt.save does not take; save with the "
            "engine's save_checkpoint"
        )


def spec_json(spec: OptimSpec) -> dict[str, Any]:
    return {
        "spec": str(spec),
        "engine": spec.engine,
        "overrides": dict(spec.overrides),
        "hyper": json_values.encode(dict(spec.hyper), "the hyperparameters"),
        **({"rules": json_values.encode({k: dict(h) for k, h in spec.rules.items()}, "rules")} if spec.rules else {}),
    }


def optimizer_json(optimizer: Optimizer) -> dict[str, Any]:
    """Everything about the optimizer that is not a tensor."""
    optimizer.setup.check_whole()
    refuse_vectors(optimizer)
    optimizer.synchronize()
    optimizer.store.check_all()
    parameters = {}
    for name, p, group in optimizer.params.entries():
        if not has_shape(p):
            raise ValueError(f"{name} has no shape yet: a lazy module must see data before it can be saved")
        entry: dict[str, Any] = {"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")}
        if optimizer.state.get(p):
            state = optimizer.state[p]
            h = optimizer.setup.rule_of(group).keeping(group, state)
            codes = moment_codes(optimizer.spec, h, name, tuple(p.shape))
            entry["step"] = float(optimizer.state[p]["step"])
            entry["moments"] = {m.name: {"format": fmt.name, "signed": m.signed} for m, fmt in codes}
            if MASTERS[optimizer.spec.master].key in optimizer.state[p]:
                entry["master"] = optimizer.spec.master
            entry |= own_json(name, own_entries(optimizer.spec.rule_of(group), state))
        if name in parameters:
            raise ValueError(f"two parameters are called {name!r}; a checkpoint needs distinct names")
        parameters[name] = entry
    others = {key: x for key, x in optimizer.state.items() if not isinstance(key, Tensor)}
    return {
        **({"others": json_values.encode(others, "the optimizer's state")} if others else {}),
        **spec_json(optimizer.spec),
        "seed": optimizer.seed,
        "skipped_steps": optimizer.skipped_steps,
        "partition": optimizer.spec.partition,
        "world_size": optimizer.partition.world_size,
        "named": is_named(optimizer.param_groups),
        "groups": groups_json(optimizer),
        "parameters": parameters,
    }


def own_json(name: str, own: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of what the user has put into the state of a parameter."""
    values = {key: x for key, x in own.items() if not isinstance(x, Tensor)}
    tensors = [key for key in own if key not in values]
    return {"own": json_values.encode(values, f"state of {name}"), "own_tensors": tensors} if own else {}


def groups_json(optimizer: Optimizer) -> list[dict[str, Any]]:
    names = iter([name for name, _, _ in optimizer.params.entries()])
    found = []
    for i, group in enumerate(optimizer.param_groups):
        hyper = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        members = [next(names) for _ in group["params"]]
        found.append({"parameters": members, "hyper": json_values.encode(hyper, f"param group {i}")})
    return found


def optimizer_tensors(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """This rank's rows: ``parameter/moment`` or ``parameter/moment.part``; steps are in the manifest."""
    for name, p, _ in optimizer.params.entries():
        for key, tensor in optimizer.state.get(p, {}).items():
            if key != "step" and isinstance(tensor, Tensor):
                yield f"{name}/{key}", tensor
