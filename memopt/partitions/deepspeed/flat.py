"""Parameters that another library has flattened and shares out: DeepSpeed's partitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import fsum
from typing import TYPE_CHECKING, Any, final

from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Rows, Shape
from memopt.partitions.base import NamedParam, Partition

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.spec import OptimSpec


@final
class Flat(Partition):
    """Every rank has vectors of its own, made of parts of many parameters. They are stepped as they are, in blocks of
    256 elements, with rules and formats that look at single elements or blocks of them. Not a value of a spec: the
    optimizer finds itself on it."""

    name = "flat"
    summary = "flat vectors in place of the parameters, shared out by DeepSpeed"
    is_flattened = True

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Tensor] = []  # in the order in which DeepSpeed has shown them

    @staticmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        return Rows.whole(shape)

    def entries(self, groups: Iterable[dict[str, Any]]) -> Iterator[NamedParam]:
        """DeepSpeed steps groups and sub-groups one by one: a vector keeps its number as its name."""
        for group in groups:
            for p in group["params"]:
                found = [i for i, q in enumerate(self._seen) if q is p]
                if not found:
                    self._seen.append(p)
                yield str(found[0] if found else len(self._seen) - 1), p, group

    def total_squares(self, parameters: Sequence[Tensor], squares: Sequence[float]) -> float:
        import torch

        return self.total(torch.tensor([fsum(squares)], dtype=torch.float64)).item()

    def any_rank(self, bad: list[str], parameters: Sequence[Tensor]) -> list[str]:
        return self.anywhere(bad, "cpu")

    def refuse_conversion(self, spec: OptimSpec, needs_shapes: str | None) -> None:
        if needs_shapes:
            raise SpecError(
                f"convert_ cannot go to '{spec}', which {needs_shapes}, while the state is of DeepSpeed's flat "
                "vectors: make the optimizer with it"
            )
