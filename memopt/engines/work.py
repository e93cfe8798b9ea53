"""What an engine is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from memopt.geometry import Rows

if TYPE_CHECKING:
    from torch import Tensor


class Work(NamedTuple):
    """One parameter's part of a step."""

    name: str
    index: int  # type: ignore[assignment]  # place among all parameters of the optimizer, for the dither's key
    rows: Rows
    p: Tensor  # [rows.local_shape], a view of the parameter
    g: Tensor  # [rows.local_shape], a view of its gradient, in the gradient's dtype
    state: dict[str, Tensor]
    step: int  # from 1
    h: Mapping[str, Any]
    groups: tuple[Any, ...] = ()  # the process groups over which the parameter's rows are cut
    counted: Any = ...  # of dimension 0 of p, what counts in sums over ranks: not what is stepped on another one too
