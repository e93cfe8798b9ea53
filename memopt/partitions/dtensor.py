"""Which rows of a parameter a DTensor holds here, and over which process groups the others are."""

from __future__ import annotations

from inspect import signature
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from memopt.core.rows import Rows, Shape, indices_of_row
from memopt.partitions.world import ProcessGroups

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.tensor import DTensor


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a DTensor, without importing what defines it where nothing else has."""
    import sys

    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local_of(x: Any) -> Any:
    """What is here of a DTensor; anything else as it is."""
    return x.to_local() if is_dtensor(x) else x


def of_fsdp1(name: str, p: object) -> str | None:
    """Why a parameter that FSDP1 has flattened is not stepped; None where none has."""
    if not getattr(p, "_fsdp_flattened", False):  # torch/distributed/fsdp/_common_utils.py
        return None
    return (
        f"{name} is a part of a flat vector of FSDP1 (FullyShardedDataParallel), which has no rows; use FSDP2: "
        "torch's fully_shard or memopt.shard (accelerate: fsdp_version=2) and a spec that ends in '/zero3'"
    )


class LocalRows(NamedTuple):
    """``rows`` are stepped here. Where a dimension other than the first is cut, ``rows.shape`` has this rank's share
    of it, and the parameter is a slab of the whole: enough for updates that look at single elements."""

    rows: Rows
    groups: ProcessGroups


def chunk(shape: Shape, rank: int, world_size: int) -> Rows:
    """The rows of ``Shard(0)``, as ``torch.chunk`` cuts: ``ceil(R / N)`` on the first ranks, the rest on the next,
    none on the last ones.

    >>> [chunk((5, 3), r, 4).count for r in range(4)]
    [2, 2, 1, 0]
    """
    if not shape:
        return Rows.whole(shape)
    size = -(-shape[0] // world_size)
    first = min(rank * size, shape[0])
    return _rows(shape, first, min(first + size, shape[0]), size)


def _rows(shape: Shape, start: int, stop: int, size: int) -> Rows:
    """Indices ``start`` up to ``stop`` of dimension 0, which is cut at multiples of ``size``: in rows of one index
    where it may be cut within one of several. A vector is cut between any two elements."""
    unit = indices_of_row(shape) if len(shape) > 1 else 0
    if unit and (size % unit == 0 or size >= shape[0]):
        return Rows(shape, -(-start // unit), -(-stop // unit))
    return Rows(shape, start, stop, 1)


def local_rows(name: str, p: DTensor) -> LocalRows:
    """Raises RuntimeError, with the name, for placements whose rows are not one range."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements, shape = p.device_mesh, p.placements, tuple(p.shape)
    cut = [i for i, one in enumerate(placements) if not one.is_replicate()]
    for i in cut:
        if placements[i].is_partial():
            raise RuntimeError(
                f"{name} is a DTensor with the placements {placements}: a sum that was not taken yet cannot be stepped"
            )
    first = [i for i in cut if _dim(placements[i]) == 0]
    ranks = prod(mesh.size(i) for i in first)
    if any(_is_strided(placements[i]) for i in cut) and shape[0] % ranks:
        raise RuntimeError(
            f"{name} has {shape[0]} rows, which {ranks} ranks of data and tensor parallelism cannot "
            "share evenly; its rows on a rank would not be one range"
        )
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    groups = tuple(mesh.get_group(i) for i in cut if mesh.size(i) > 1)
    if not shape:
        return LocalRows(Rows.whole(shape), groups)
    slab = (shape[0], *local[1:])
    # Of several dimensions of the mesh the pieces are as long as each other, or cut anywhere.
    size = -(-shape[0] // ranks) if len(first) < 2 or shape[0] % ranks == 0 else 1
    return LocalRows(_rows(slab, offset[0], offset[0] + local[0], size), groups)


def as_sharded(x: Tensor, p: Any) -> Tensor:
    """``x``, the same on every rank, cut as ``p`` is, if that is a DTensor and ``x`` is not."""
    if not is_dtensor(p) or is_dtensor(x):
        return x
    from torch.distributed.tensor import distribute_tensor

    # All ranks have the same x. Before torch 2.7 it is sent round all the same.
    alone: Any = {"src_data_rank": None} if "src_data_rank" in signature(distribute_tensor).parameters else {}
    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, **alone)


def like(p: Any, x: Tensor, shape: Shape, *, replicated: bool) -> DTensor:
    """A part of the state of ``p`` as a DTensor: cut as ``p`` is, or whole on every rank. ``x`` is not copied."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    placements = tuple(Replicate() for _ in p.placements) if replicated else p.placements
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    meta = TensorMeta(_size(shape), stride, x.dtype)
    # Not from_local: it would move state that is kept on the host to the mesh's device.
    return DTensor(x, DTensorSpec(p.device_mesh, placements, tensor_meta=meta), requires_grad=False)


def _size(shape: Shape) -> Any:
    import torch

    return torch.Size(shape)


def _dim(placement: Any) -> int:
    return int(placement.dim)


def _is_strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"
