"""``none``: rounded to nearest; what is smaller than half a unit in the last place is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.masters.base import Bare

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.formats.base import Shard


@final
class Rounded(Bare):
    """p <- round(x): no bytes beside the parameter. What torch.optim does with 16-bit parameters.

    A bf16 number has 8 bits: an update under 2^-9 of the weight changes nothing. AdamW moves a weight by about the
    rate, so at lr 1e-5 every weight above 0.005 stands still.
    """

    name = "none"
    summary = "the parameter itself is updated, rounded to nearest"

    def write(self, x: Tensor, p: Tensor, stored: Tensor | None, shard: Shard) -> None:
        p.copy_(x)
