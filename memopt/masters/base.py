"""What a master is: what stands beside a 16-bit parameter so that small updates add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING, ClassVar

from memopt.core.ledger import TensorSpec
from memopt.core.rows import FLAT_ROW, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.formats.base import Shard

#: dtypes in which an update is lost; wider parameters hold it themselves, and nothing is kept for them.
LOW_PRECISION = ("bfloat16", "float16")

#: A master's place among the moments of a rule, for the dither's key: behind all of them.
ORDER = 255


class Master(ABC):
    """A value on the master axis. Subclasses are final.

    A parameter p of 16 bits and one tensor beside it stand together for a more precise value x, fp32. ``key`` is that
    tensor's state key (empty where there is none). Three promises: rounding x to the parameter's dtype gives p, so the
    model never sees anything but p; *a tensor of zeros stands for the weight itself*, so new state needs no copy of
    the weights; and where somebody else changed the weight (``model.load_state_dict``) the weight wins, element by
    element, over what was kept for the old one (``docs/masters.md``).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    key: ClassVar[str] = ""
    dithered: ClassVar[bool] = False  # whether it rounds with the random bits of a row and column

    @abstractmethod
    def stored_dtype(self, dtype: str) -> str:
        """dtype of the tensor beside a parameter of this 16-bit dtype; empty where there is none."""

    @abstractmethod
    def read(self, p: Tensor, stored: Tensor | None) -> Tensor:
        """x, fp32 [p.shape], a new tensor; ``stored`` [p.shape] is the tensor beside p."""

    @abstractmethod
    def foreign(self, p: Tensor, stored: Tensor) -> Tensor:
        """bool [p.shape]: where ``stored`` shows that it is of another weight, and is not used."""

    @abstractmethod
    def keep(self, x: Tensor, p: Tensor, stored: Tensor | None) -> None:
        """Put into ``stored`` what x has beyond p, as precisely as it can; p is not changed."""

    @abstractmethod
    def write(self, x: Tensor, p: Tensor, stored: Tensor | None, shard: Shard) -> None:
        """Round x into p, and keep what is left over; ``shard`` chooses the dither where there is one."""

    def layout(self, rows: Rows, dtype: str) -> dict[str, TensorSpec]:
        """The tensor beside these rows of a parameter: state key -> dtype and shape; cut by rows as the parameter."""
        own = self.stored_dtype(dtype) if dtype in LOW_PRECISION else ""
        return {self.key: TensorSpec(own, rows.local_shape)} if own else {}


class Bare(Master):
    """Nothing stands beside the parameter: x is p."""

    def stored_dtype(self, dtype: str) -> str:
        return ""

    def read(self, p: Tensor, stored: Tensor | None) -> Tensor:
        return p.float()

    def foreign(self, p: Tensor, stored: Tensor) -> Tensor:
        raise NotImplementedError("nothing is kept")

    def keep(self, x: Tensor, p: Tensor, stored: Tensor | None) -> None:
        pass


def words(shard: Shard, x: Tensor) -> Tensor:
    """The dither's int32 words for the rows of ``x`` [local_shape], in its shape."""
    from memopt.core import dither

    rows = shard.rows.in_units(FLAT_ROW)  # where it is cut within a row, the rows around it
    found = dither.bits(shard.key, dither.shuffled(shard.step), rows.first, rows.count, rows.cols, x.device)
    start = (shard.rows.bounds[0] - rows.bounds[0]) * prod(rows.shape[1:])
    return found.view(-1)[start : start + x.numel()].view(x.shape)
