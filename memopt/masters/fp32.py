"""``fp32``: a copy of the weights in 32 bits, which is updated; the weights are its rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.masters.base import Master

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.formats.base import Shard


@final
class FP32Copy(Master):
    """``master`` fp32 in the parameter's shape, 4 bytes per parameter::

        x = master where round(master) = p, else p
        p <- round(x);  master <- x

    Exactly the trajectory of fp32 weights whose forward pass runs on rounded copies. A master that does not round to
    the weight, zeros included, belongs to another weight and is replaced.

    Source: Micikevicius et al., "Mixed precision training", ICLR 2018.
    """

    name = "fp32"
    summary = "an fp32 copy, 4 bytes per parameter"
    key = "master"

    def stored_dtype(self, dtype: str) -> str:
        return "float32"

    def read(self, p: Tensor, stored: Tensor | None) -> Tensor:
        import torch

        assert stored is not None
        return torch.where(self.foreign(p, stored), p.float(), stored)

    def foreign(self, p: Tensor, stored: Tensor) -> Tensor:
        return stored.to(p.dtype) != p

    def keep(self, x: Tensor, p: Tensor, stored: Tensor | None) -> None:
        import torch

        assert stored is not None
        # Another master may have rounded a tie the other way: the neighbour on p's side rounds to p.
        stored.copy_(torch.where(x.to(p.dtype) == p, x, torch.nextafter(x, p.float())))

    def write(self, x: Tensor, p: Tensor, stored: Tensor | None, shard: Shard) -> None:
        assert stored is not None
        p.copy_(x)
        stored.copy_(x)
