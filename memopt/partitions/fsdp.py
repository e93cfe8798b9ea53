"""Parameters that torch has sharded: the optimizer steps what is here of each DTensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum
from typing import TYPE_CHECKING, Any

from memopt.core.rows import Rows, Shape, indices_of_row
from memopt.partitions.base import Partition, sum_over
from memopt.partitions.dtensor import LocalRows, chunk, is_dtensor, local_rows, of_fsdp1
from memopt.partitions.exchange import Share
from memopt.partitions.world import ProcessGroups

if TYPE_CHECKING:
    from torch import Tensor


class Sharded(Partition):
    """Rank r of N owns rows ``[r c, (r + 1) c)``, ``c = ceil(R / N)``, of a parameter of R rows, as FSDP2 cuts it.

    Rows and the groups over which sums are taken come from each parameter's own mesh and placements, so HSDP's
    replicas and tensor parallelism are what the DTensor says. Nothing is published: FSDP2 gathers parameters when it
    needs them. Vectors and matrices of narrow rows are cut between any two elements or rows, and stay in 32 bits.
    """

    shards_weights = True

    def __init__(self, process_group: Any = None) -> None:
        super().__init__(process_group)
        self._local_rows: dict[Any, LocalRows] = {}

    @staticmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        return chunk(shape, rank, world_size)

    @staticmethod
    def declines(shape: Shape) -> str | None:
        if len(shape) == 1:
            return "a vector that is cut between any two elements"
        together = indices_of_row(shape)
        return f"{together} of its rows share a block, and it is cut between any two" if together > 1 else None

    def validate_params(self, parameters: Iterable[tuple[str, Tensor]], spec: str) -> None:
        parameters = list(parameters)
        for name, p in parameters:
            if reason := of_fsdp1(name, p):
                raise RuntimeError(reason)
        if self.world_size > 1 and parameters and not any(is_dtensor(p) for _, p in parameters):
            replicated = f"{spec.partition('/')[0]}/zero1"
            raise RuntimeError(
                f"{parameters[0][0]} is whole on this rank, and {spec!r} is for sharded parameters: "
                "call memopt.shard(model, spec), or fully_shard, before memopt.create; for replicated "
                f"ones write {replicated!r}"
            )
        for name, p in parameters:
            self._of(p, name)

    def _of(self, p: Any, name: str = "a parameter") -> LocalRows:
        if not is_dtensor(p):  # ignored by fully_shard: whole on every rank
            whole = Rows.whole(tuple(p.shape))
            return LocalRows(whole.in_units(1) if p.dim() == 1 else whole, ())
        key = p.device_mesh, p.placements, p.shape
        if key not in self._local_rows:
            self._local_rows[key] = local_rows(name, p)
        return self._local_rows[key]

    def local_rows(self, p: Tensor) -> Rows:
        return self._of(p).rows

    def local(self, p: Any, rows: Rows, x: Any) -> Any:
        if not is_dtensor(x):
            return x
        if x.placements != p.placements:  # a gradient that tensor parallelism left as a sum, or whole
            x = x.redistribute(p.device_mesh, p.placements)
        return x.to_local()

    def memory_of(self, p: Any, x: Any) -> Any:
        return x._local_tensor if is_dtensor(x) and x.placements == p.placements else x

    def groups(self, p: Tensor) -> ProcessGroups:
        return self._of(p).groups

    def total_squares(self, parameters: Sequence[Tensor], squares: Sequence[float]) -> float:
        import torch

        cut: dict[ProcessGroups, list[float]] = {}
        for p, square in zip(parameters, squares, strict=True):
            cut.setdefault(self.groups(p), []).append(square)
        sums = [(torch.tensor([fsum(some)], dtype=torch.float64), groups) for groups, some in cut.items()]
        return fsum(sum_over(one, groups).item() for one, groups in sums)

    def shares(self, p: Tensor) -> tuple[Share, ...]:
        import torch.distributed as dist

        ranks = dist.get_world_size(self.groups(p)[0])
        found = [chunk(tuple(p.shape), rank, ranks).bounds for rank in range(ranks)]
        return tuple(Share(bounds, bounds) for bounds in found)

    def any_rank(self, bad: list[str], parameters: Sequence[Tensor]) -> list[str]:
        return self.anywhere(bad, parameters[0].device) if parameters else bad
