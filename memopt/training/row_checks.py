"""Whether rows of a parameter's state can change: whose it is, how many it has, and where it is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import Tensor

from memopt.checkpoint.conversion.in_place import param_states
from memopt.checkpoint.conversion.param_state import ParamState
from memopt.layout.replaced_state import is_own
from memopt.partitions.dtensor import is_dtensor

if TYPE_CHECKING:
    from memopt.optim.parts import OptimizerParts


def param_state_of(optimizer: OptimizerParts, p: Tensor) -> ParamState:
    optimizer.setup.check_whole()
    optimizer.placement_stores.check()
    for q, param in param_states(optimizer, optimizer.spec, optimizer.param_groups, optimizer.partition):
        if q is p:
            return param
    shape = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
    raise ValueError(f"a parameter of shape {shape} is not one of this optimizer's")


def movable(optimizer: OptimizerParts, p: Tensor, into: Tensor | None) -> tuple[str, int]:
    """Its name, and how many rows its state has; raises where they cannot change."""
    name = param_state_of(optimizer, p).name
    if optimizer.partition.is_flattened:
        raise RuntimeError(
            f"DeepSpeed has flattened {name}, and its rows are where it was cut: save, change the model, and use "
            "memopt.load(..., strict=False), which takes the rows that are in both"
        )
    if is_dtensor(p) or is_dtensor(into):
        _check_sharded(optimizer, name, p, into)
    if optimizer.release is not None:
        raise RuntimeError(f"{name} is stepped inside backward(), by hooks that know its size: release.remove() first")
    if p.dim() == 0:
        raise ValueError(f"{name} is a single number and has no rows")
    take_over(optimizer, p)
    if into is None:
        return name, shape_of_state(optimizer, p)[0]
    if into.dtype != p.dtype or into.device != p.device or into.shape[1:] != p.shape[1:] or into.dim() != p.dim():
        raise ValueError(
            f"into is {into.dtype} {tuple(into.shape)} on {into.device}; in the place of {name} goes {p.dtype} "
            f"{('n', *p.shape[1:])} on {p.device}"
        )
    if not into.is_leaf or any(into is q for _, q, _ in optimizer.params.entries()):
        raise ValueError(f"into is {'no leaf' if not into.is_leaf else 'a parameter of this optimizer already'}")
    return name, shape_of_state(optimizer, p)[0]


def _check_sharded(optimizer: OptimizerParts, name: str, p: Tensor, into: Tensor | None) -> None:
    """Raise RuntimeError for a parameter that torch has sharded, but where another takes its place that is cut by rows
    over the same ranks."""
    partition = optimizer.partition
    for x in (p, into):
        if x is None or not is_dtensor(x):
            raise RuntimeError(
                f"torch has sharded {name}, which cannot change its size where it is: make the model anew, shard it, "
                "and give the weight that takes its place as into=. Or save, and use memopt.load(..., strict=False), "
                "which takes the rows that are in both"
            )
        if partition.local_rows(x) != partition.rows(tuple(x.shape), partition.rank, partition.world_size):
            raise RuntimeError(
                f"{name} is not cut by rows over all ranks; save, and use memopt.load(..., strict=False)"
            )


def take_over(optimizer: OptimizerParts, p: Tensor) -> None:
    """What somebody else has put into its state is taken over first, as before a step. A weight that has another size
    than its state by now is held against the layout of that size later."""
    for one in optimizer.params.resolved():
        if one.p is p and optimizer.state.get(p):
            with suppress(RuntimeError):
                optimizer.store.check(one, optimizer.partition.local(p, one.layout.rows, p.detach()))


def shape_of_state(optimizer: OptimizerParts, p: Tensor) -> tuple[int, ...]:
    """The shape for which its state was made; its data may be of another by now. That of the weight where there is no
    state, or where no number of rows fits it."""
    state, shape = optimizer.state.get(p), tuple(p.shape)
    if not state or not shape:
        return shape
    param, partition = param_state_of(optimizer, p), optimizer.partition
    rule = param.rule
    there = {
        k: tuple(x.shape) for k, x in state.items() if isinstance(x, Tensor) and k != "step" and not is_own(rule, k)
    }
    made = [m.shape[0] for m in optimizer.params.made if m.parameter() is p and m.shape[1:] == shape[1:]]
    lengths = [x.shape[0] for x in state.values() if isinstance(x, Tensor) and x.dim()]
    halves = [2 * n - odd for n in lengths for odd in (0, 1)] if len(shape) == 1 else []  # two codes in a byte
    for rows in dict.fromkeys([*made, shape[0], *lengths, *halves]):
        tried = rows, *shape[1:]
        here = param._replace(rows=partition.rows(tried, partition.rank, partition.world_size))
        lines = [line for line in here.lines() if line.key in there]
        if (lines or not there) and all(there[line.key] == line.shape for line in lines):
            return tried
    return shape


def check_shape(optimizer: OptimizerParts, param: ParamState, p: Tensor) -> None:
    shape = shape_of_state(optimizer, p)
    if shape != tuple(p.shape):
        raise RuntimeError(
            f"{param.name} is {tuple(p.shape)} and its state {shape}: call opt.append_rows or opt.select_rows first"
        )


def length(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1
