"""Parameters that another library has flattened and shares out: DeepSpeed's partitions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from memopt.engines.native import moment_formats
from memopt.geometry import Rows, Shape
from memopt.partitions.base import Partition
from memopt.partitions.world import membership
from memopt.rules import RULES

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.keeper import Keeper
    from memopt.spec import OptimSpec


@final
class Flat(Partition):
    """Every rank has vectors of its own, made of parts of many parameters. They are stepped as they are, in blocks of
    256 elements, with rules and formats that look at single elements or blocks of them. Not a value of a spec: the
    optimizer finds itself on it."""

    name = "flat"
    summary = "flat vectors in place of the parameters, shared out by DeepSpeed"

    def __init__(self) -> None:
        self._rank, self._world_size = membership(self.name, None)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @staticmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        return Rows.whole(shape)

    def agree(self, bad: list[str], parameters: Sequence[Tensor]) -> list[str]:
        if self.world_size == 1:
            return bad
        import torch
        import torch.distributed as dist

        on = "cuda" if dist.get_backend() == "nccl" else "cpu"
        found = torch.tensor([float(bool(bad))], device=on)
        dist.all_reduce(found)
        return bad or ["a parameter on another rank"] * bool(found.item())


def check_replaced(optimizer: Keeper) -> None:
    """Notice that another tool has put other tensors in the place of the parameters the optimizer was made with.

    DTensors of the same shapes (FSDP2, through accelerate) and anything of the same shape go on. Vectors in place of
    matrices are DeepSpeed's: the optimizer goes on over :class:`Flat`, or raises RuntimeError where the rule or the
    format needs the shapes. State that was made for parameters that are gone is said once, in a warning.
    """
    now: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    ids, shapes = [id(p) for p in now], [tuple(p.shape) for p in now]
    if ids == optimizer._seen_ids:
        return
    made_for = optimizer._made_for
    optimizer._seen_ids = ids
    if isinstance(optimizer.partition, Flat) or shapes == made_for:
        _warn_of_orphans(optimizer, set(ids))
        return
    if all(len(shape) == 1 for shape in shapes) and any(len(shape) > 1 for shape in made_for):
        reason = needs_shapes(optimizer.spec)
        if reason:
            raise RuntimeError(
                f"the parameters were replaced by {len(now)} flat vectors (DeepSpeed does so), and '{optimizer.spec}' "
                f"{reason}; use an element-wise rule such as adamw-8bit, or FSDP2: '/zero3'"
            )
        optimizer.partition = Flat()


def needs_shapes(spec: OptimSpec) -> str | None:
    """Why a spec cannot step flat vectors in place of the parameters; None where it can."""
    if spec.partition != "none":
        return f"shards by itself: DeepSpeed's stage takes the place of /{spec.partition}"
    if spec.overrides:
        return "has overrides by name, and the names are gone"
    if not RULES[spec.rule].element_wise:
        return f"needs the parameters' shapes: {spec.rule} takes statistics of whole tensors"
    held = {fmt.name for _, fmt, _ in moment_formats(spec, spec.resolve(), "", Rows.whole((4096, 4096)))}
    whole = held & {"factored", "rowmean"}
    return f"needs the parameters' shapes: a moment is held as {whole.pop()}" if whole else None


def _warn_of_orphans(optimizer: Keeper, ids: set[int]) -> None:
    orphans = sum(1 for p, state in optimizer.state.items() if state and id(p) not in ids)
    if orphans:
        warnings.warn(
            f"the optimizer holds state of {orphans} parameters that it no longer has: something (accelerate.prepare, "
            "fully_shard) replaced them after the state was made. Make or load the state afterwards",
            stacklevel=3,
        )
