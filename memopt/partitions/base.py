"""What a partition is: which rows of which parameter a rank owns, and how updated rows reach the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from memopt.geometry import Rows, Shape
from memopt.partitions.world import answered

if TYPE_CHECKING:
    from torch import Tensor

#: The process groups over which a parameter's rows are cut, in the order in which sums are taken; none: all are here.
Groups = tuple[Any, ...]
#: Elements on one rank whose updates are under way at once where they need sums over ranks: it bounds temporaries.
NUMEL_TOGETHER = 4 * 2**20


class Partition(ABC):
    """A value on the partition axis. ``rows`` and ``declines`` are pure arithmetic, for pricing; the rest needs a
    process group."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @staticmethod
    @abstractmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        """The rows of a parameter of this global shape that ``rank`` of ``world_size`` owns."""

    @staticmethod
    def declines(shape: Shape) -> str | None:
        """Why a parameter of this *global* shape cannot be cut between blocks and stays in 32 bits, or None."""
        return None

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    @abstractmethod
    def world_size(self) -> int: ...

    def admit(self, parameters: Iterable[tuple[str, Tensor]], spec: str) -> None:
        """Raise RuntimeError for parameters that are not as this partition (the one of ``spec``) takes them. A
        partition of replicated parameters takes no DTensors."""
        from memopt.partitions.dtensor import is_dtensor

        for name, p in parameters:
            if is_dtensor(p):
                whole = spec.partition("/")[0]
                placements = getattr(p, "placements", ())
                raise RuntimeError(f"{name} is a DTensor, sharded with {placements}, and {spec!r} is for parameters "
                                   f"that are whole on every rank; for sharded ones write '{whole}/zero3'")  # fmt: skip

    def held(self, p: Tensor) -> Rows:
        """The rows of this parameter that are stepped here."""
        return self.rows(tuple(p.shape), self.rank, self.world_size)

    def local(self, p: Tensor, rows: Rows, x: Tensor) -> Tensor:
        """A view of these rows of ``x``, which is the parameter ``p`` or its gradient."""
        return owned(x, rows)

    def groups(self, p: Tensor) -> Groups:
        """The groups over which the rows of ``p`` are cut."""
        return ()

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks."""
        return x

    def total_of(self, p: Tensor) -> Callable[[Tensor], Tensor]:
        """What adds a tensor up over the ranks that hold the other rows of ``p``."""
        groups = self.groups(p)
        return lambda x: sum_over(x, groups)

    def agree(self, bad: list[str], parameters: Sequence[Tensor]) -> list[str]:
        """Names of parameters with a bad gradient, empty only if they are on every rank."""
        return bad

    def buckets(self, parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Ranges of the parameters that are stepped and published one after the other."""
        return [(0, len(parameters))]

    def publish(self, parameters: Sequence[Tensor]) -> None:  # noqa: B027  # most have nothing to do
        """Begin to bring every rank's updated rows of these parameters, one of :meth:`buckets`, to all ranks."""

    def finish(self) -> None:  # noqa: B027
        """Wait until all that was published is there."""


def sum_over(x: Tensor, groups: Groups) -> Tensor:
    """The sum of ``x`` over the ranks of these groups, one group after the other; ``x`` itself where there are none."""
    if not groups:
        return x
    import torch.distributed as dist

    x = x.clone()
    with answered("a step"):
        for group in groups:
            dist.all_reduce(x, group=group)
    return x


def owned(p: Tensor, rows: Rows) -> Tensor:
    """A view of these rows of a parameter (or of its gradient)."""
    if rows.is_whole:
        return p
    start, stop = rows.bounds
    return (p if p.dim() else p.unsqueeze(0))[start:stop]
