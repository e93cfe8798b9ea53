"""An optimizer as those know it to whom it hands itself: conversion, surgery, ``explain()``.

They read and change its parts and call nothing that would call them, so they need not know
:class:`memopt.optimizer.Optimizer`, which imports them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from memopt.core.integrity import Integrity
    from memopt.engines import Engine
    from memopt.optim.params import Params
    from memopt.optim.setup import Releasing, Setup
    from memopt.optim.state_store import StateStore
    from memopt.optim.step import Stepper
    from memopt.partitions import Partition
    from memopt.placements.stores.by_placement import PlacementStores
    from memopt.rules import Rule
    from memopt.spec import OptimSpec


class OptimizerParts(Protocol):
    """What :class:`memopt.Optimizer` is made of, and ``torch.optim.Optimizer``'s own attributes."""

    setup: Setup
    params: Params
    store: StateStore
    stepper: Stepper
    spec: OptimSpec
    rule: Rule
    engine: Engine
    partition: Partition
    placement_stores: PlacementStores
    integrity: Integrity
    process_group: Any
    nonfinite: str
    seed: int
    capturable: bool
    max_grad_norm: Any
    unfinished: Any
    defaults: dict[str, Any]
    kinds: dict[str, str]
    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def release(self) -> Releasing | None: ...
    @property
    def skipped_steps(self) -> int: ...
    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None: ...

    def synchronize(self) -> None: ...
