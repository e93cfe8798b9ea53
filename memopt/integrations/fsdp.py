"""FSDP2: ``memopt.shard`` cuts a model as a spec says; torch gathers and scatters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import SpecError
from memopt.partitions import PARTITIONS
from memopt.partitions.fsdp import Sharded
from memopt.partitions.world import membership
from memopt.spec import OptimSpec, parse

if TYPE_CHECKING:
    from torch import nn


def shard(
    model: nn.Module,
    spec: str | OptimSpec,
    *,
    mesh: Any = None,
    blocks: Iterable[nn.Module] | None = None,
    **options: Any,
) -> nn.Module:
    """Shard a model's parameters with ``torch.distributed.fsdp.fully_shard``, in place, and return it.

    ``/zero2`` keeps a block's parameters whole from its forward pass to the end of its backward pass, ``/zero3`` only
    while it computes. Make the optimizer afterwards. One process without a process group keeps its model as it is.

    Args:
        model: Cut in place; parameters become DTensors.
        spec: A spec that ends in ``/zero2`` or ``/zero3``.
        mesh: A ``DeviceMesh`` of one dimension (default: all ranks) or of two, whose first one is replicated (HSDP).
        blocks: Modules that are gathered one at a time; by default those in every ``nn.ModuleList``. What is in none
            goes with ``model`` itself.
        options: Further keywords of ``fully_shard`` (``mp_policy``, ``offload_policy``, …).

    Returns:
        ``model``.

    Raises:
        SpecError: for a spec that shards no parameters, and for a model of DTensors without ``mesh``.

    >>> import memopt, torch
    >>> model = memopt.shard(torch.nn.Linear(4, 4), "adamw-8bit/zero3")  # one process: as it was
    >>> opt = memopt.create(model, "adamw-8bit/zero3")
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    parsed = parse(spec)
    partition = PARTITIONS[parsed.partition]
    if not issubclass(partition, Sharded):
        sharding = ", ".join(f"/{name}" for name, p in PARTITIONS.items() if issubclass(p, Sharded))
        raise SpecError(f"'{parsed}' does not shard parameters; specs that do end in {sharding}")
    cut = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if cut and mesh is None:
        raise SpecError(f"{cut[0]} is a DTensor already; give the mesh= of the data-parallel ranks")
    import torch.distributed as dist

    if mesh is None and membership(partition.name, None)[1] == 1 and not dist.is_initialized():
        return model
    options = {"reshard_after_forward": partition.reshard_after_forward, **options}
    if mesh is not None:
        options["mesh"] = mesh
    for block in _blocks(model) if blocks is None else blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Modules in the outermost lists of modules that have parameters."""
    from torch import nn

    if isinstance(model, nn.ModuleList):
        return [m for m in model if any(True for _ in m.parameters())]
    return [block for child in model.children() for block in _blocks(child)]
