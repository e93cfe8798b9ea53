"""What an engine is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from memopt.core.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.layout.param import ParamLayout


class Work(NamedTuple):
    """One parameter's part of a step."""

    layout: ParamLayout
    p: Tensor  # [rows.local_shape], a view of the parameter
    g: Tensor  # [rows.local_shape], a view of its gradient, in the gradient's dtype
    state: dict[str, Tensor]
    step: int  # from 1
    h: Mapping[str, Any]
    groups: tuple[Any, ...] = ()  # the process groups over which the parameter's rows are cut
    scale: float = 1.0  # what the gradient is multiplied by, as an fp32 number, and rounded to its dtype
    shares: tuple[Any, ...] = ()  # what each rank of the first group has of a matrix that they are to put together
    device: Any = None  # the parameter's, where p is a copy of it elsewhere
    sums: Any = None  # fp64 [rule.reports], to which the update adds what it reports
    counted: Any = ...  # of dimension 0 of p, what counts in sums over ranks: not what is stepped on another one too

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def index(self) -> int:  # type: ignore[override]
        """Its place among all parameters of the optimizer, for the dither's key."""
        return self.layout.index

    @property
    def rows(self) -> Rows:
        return self.layout.rows


def count_steps(works: Sequence[Work]) -> None:
    """Note that these have stepped."""
    if works:
        import torch

        torch._foreach_add_([work.state["step"] for work in works], 1)
