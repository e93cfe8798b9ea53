"""What a partition is: which rows of which parameter a rank owns, and how updated rows reach the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import fsum
from typing import TYPE_CHECKING, Any, ClassVar

from memopt.core.rows import Rows, Shape
from memopt.partitions.exchange import Share
from memopt.partitions.world import ProcessGroups, answered, membership

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.spec import OptimSpec

#: ``(name, parameter, group)``.
NamedParam = tuple[str, "Tensor", dict[str, Any]]
#: Elements on one rank whose updates are under way at once where they need sums over ranks: it bounds temporaries.
NUMEL_TOGETHER = 4 * 2**20
#: Of matrices that are worked on whole and are larger, so many for each rank are under way instead: all ranks have
#: work, and one travels while another is worked on.
MATRICES_TOGETHER = 2


class Partition(ABC):
    """A value on the partition axis. ``rows`` and ``declines`` are pure arithmetic, for pricing; the rest needs a
    process group."""

    name: ClassVar[str]
    summary: ClassVar[str]
    #: Whether DeepSpeed's vectors are in the place of the parameters.
    is_flattened: ClassVar[bool] = False
    #: Whether what is stepped has the same memory at every step.
    plannable: ClassVar[bool] = True
    #: Whether weights and gradients are sharded with the state, and whether a block's weights are given up after its
    #: forward pass and gathered again for the backward pass: the calculator prices both.
    shards_weights: ClassVar[bool] = False
    reshard_after_forward: ClassVar[bool] = False
    rank: int
    world_size: int

    def __init__(self, process_group: Any = None) -> None:
        self.group = process_group
        self.rank, self.world_size = membership(self.name, process_group)

    @staticmethod
    @abstractmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        """The rows of a parameter of this global shape that ``rank`` of ``world_size`` owns."""

    @staticmethod
    def declines(shape: Shape) -> str | None:
        """Why a parameter of this *global* shape cannot be cut between blocks and stays in 32 bits, or None."""
        return None

    def entries(self, groups: Iterable[dict[str, Any]]) -> Iterator[NamedParam]:
        """What is stepped, of the optimizer's groups: ``(name, parameter, group)`` in order; without names, the
        parameter's number."""
        index = 0
        for group in groups:
            names = group.get("param_names")
            if names is None or len(names) != len(group["params"]):  # vectors that were put in their place
                names = [str(index + i) for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                yield name, p, group
            index += len(group["params"])

    def step_context(self, groups: Sequence[Mapping[str, Any]]) -> AbstractContextManager[object]:
        """Around a step of these groups."""
        return nullcontext()

    def logical_params(self, optimizer: Any) -> AbstractContextManager[object]:
        """Around saving and loading: the optimizer's groups have what is stepped as their parameters."""
        return nullcontext()

    def cut(self) -> dict[str, list[int]] | None:
        """Where parameters are cut, by name, where rank and world size do not say it."""
        return None

    def refuse_conversion(self, spec: OptimSpec, needs_shapes: str | None) -> None:  # noqa: B027
        """Raise SpecError where ``convert_`` cannot go to this spec of the same partition."""

    def validate_params(self, parameters: Iterable[tuple[str, Tensor]], spec: str) -> None:
        """Raise RuntimeError for parameters that are not as this partition (the one of ``spec``) takes them. A
        partition of replicated parameters takes no DTensors."""
        from memopt.partitions.dtensor import is_dtensor, of_fsdp1

        for name, p in parameters:
            if reason := of_fsdp1(name, p):
                raise RuntimeError(reason)
            if is_dtensor(p):
                whole = spec.partition("/")[0]
                placements = getattr(p, "placements", ())
                raise RuntimeError(
                    f"{name} is a DTensor, sharded with {placements}, and {spec!r} is for parameters "
                    f"that are whole on every rank; for sharded ones write '{whole}/zero3'"
                )

    def local_rows(self, p: Tensor) -> Rows:
        """The rows of this parameter that are stepped here."""
        return self.rows(tuple(p.shape), self.rank, self.world_size)

    def cuts_a_row(self, p: Tensor) -> bool:
        """Whether a row of this parameter is stepped on two ranks, which have parts of it."""
        return False

    def local(self, p: Tensor, rows: Rows, x: Tensor) -> Tensor:
        """A view of these rows of ``x``, which is the parameter ``p`` or its gradient."""
        return owned(x, rows)

    def memory_of(self, p: Tensor, x: Tensor) -> Tensor:
        """The tensor whose memory is what is here of ``x``, which is the parameter ``p`` or its gradient; ``x`` where
        there is none that is simply there."""
        return x

    def groups(self, p: Tensor) -> ProcessGroups:
        """The groups over which the rows of ``p`` are cut."""
        return ()

    def shares(self, p: Tensor) -> tuple[Share, ...]:
        """What each rank of the group over which the rows of ``p`` are cut has of them."""
        found = [self.rows(tuple(p.shape), rank, self.world_size).bounds for rank in range(self.world_size)]
        return tuple(Share(bounds, bounds) for bounds in found)

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks."""
        return sum_over(x, (self.group,)) if self.world_size > 1 else x

    def total_of(self, p: Tensor) -> Callable[[Tensor], Tensor]:
        """What adds a tensor up over the ranks that hold the other rows of ``p``."""
        groups = self.groups(p)
        return lambda x: sum_over(x, groups)

    def any_rank(self, bad: list[str], parameters: Sequence[Tensor]) -> list[str]:
        """Names of parameters with a bad gradient, empty only if they are on every rank. ``parameters`` are those with
        a gradient here."""
        return bad

    def anywhere(self, bad: list[str], device: Any) -> list[str]:
        """``bad``, or that there are such names on another rank. Every rank must take part."""
        if self.world_size == 1:
            return bad
        import torch

        found = self.total(torch.tensor([float(bool(bad))], device=device))
        return bad or ["a parameter on another rank"] * bool(found.item())

    def total_squares(self, parameters: Sequence[Tensor], squares: Sequence[float]) -> float:
        """From the sums of squares of what is here of the gradients of these parameters that of all gradients, every
        element counted once. Every rank must take part, unless none has gradients."""
        return fsum(squares)

    def buckets(self, parameters: Sequence[Tensor], whole: Sequence[bool] = ()) -> list[tuple[int, int]]:
        """Ranges of the parameters that are stepped and published one after the other. ``whole``: which of them are
        matrices that ranks put together and share out."""
        return [(0, len(parameters))]

    def gather(self, works: Sequence[Any]) -> Sequence[Any]:
        """These works, one of :meth:`buckets`, with what other ranks have of their rows."""
        return works

    def all_gather_begin(self, parameters: Sequence[Tensor]) -> None:  # noqa: B027  # most have nothing to do
        """Begin to bring every rank's updated rows of these parameters, one of :meth:`buckets`, to all ranks."""

    def all_gather_wait(self) -> None:  # noqa: B027
        """Wait until all that was published is there."""

    def abandon(self) -> None:  # noqa: B027
        """Forget what was published and has not arrived: the step that did so was interrupted."""


def sum_over(x: Tensor, groups: ProcessGroups) -> Tensor:
    """The sum of ``x`` over the ranks of these groups, one group after the other; ``x`` itself where there are none."""
    if not groups:
        return x
    import torch.distributed as dist

    # State and its step may be on the host while the group is one of cards alone (NCCL).
    total = x.to("cuda" if x.is_cpu and dist.get_backend(groups[0]) == "nccl" else x.device, copy=True)
    with answered("a step"):
        for group in groups:
            dist.all_reduce(total, group=group)
    return total.to(x.device)


def owned(p: Tensor, rows: Rows) -> Tensor:
    """A view of these rows of a parameter (or of its gradient)."""
    if rows.is_whole:
        return p
    start, stop = rows.bounds
    return (p if p.dim() else p.unsqueeze(0))[start:stop]
