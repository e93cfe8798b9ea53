"""``kahan``: the rounding error of the last step, added back in the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.masters.base import Master

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.formats.base import Shard

#: A fp16 compensation is kept this much larger (half a unit in the last place, 2^-12 of p, becomes p's own size): its
#: exponent goes down to 2^-24 only. bf16 has fp32's exponent.
SCALE = {"bfloat16": 1.0, "float16": 4096.0}
#: A compensation is at most half a unit in p's last place, and may have been rounded up to more by 2^-8 of itself.
SLACK = 1 - 2.0**-7


@final
class Kahan(Master):
    """``compensation`` in the parameter's own dtype and shape, 2 bytes per parameter::

        x = p + c
        p <- round(x);  c <- round(x - p)

    17 significant bits on bf16, 23 on fp16. x - p is exact in fp32; in fp16 c is kept times 4096. A compensation
    with which x would not round to p belongs to another weight and counts as 0.

    Source: Kahan, "Further remarks on reducing truncation errors", 1965; for bf16 weights Zamirai et al., "Revisiting
    BFloat16 training", 2020. They add the update to c before it meets p; here p + c is what the rule, its weight
    decay included, sees.
    """

    name = "kahan"
    summary = "Kahan's compensation, 2 bytes per parameter"
    key = "compensation"

    def stored_dtype(self, dtype: str) -> str:
        return dtype

    def read(self, p: Tensor, stored: Tensor | None) -> Tensor:
        import torch

        assert stored is not None
        exact = p.float()
        return torch.where(self.foreign(p, stored), exact, exact.add(stored.float(), alpha=1 / _scale(p)))

    def foreign(self, p: Tensor, stored: Tensor) -> Tensor:
        return p.float().add_(stored.float(), alpha=SLACK / _scale(p)).to(p.dtype) != p

    def keep(self, x: Tensor, p: Tensor, stored: Tensor | None) -> None:
        import torch

        assert stored is not None
        c = x.sub(p.float()).mul_(_scale(p))
        stored.copy_(torch.where(c.isfinite(), c, 0.0))  # an infinite weight has no rest

    def write(self, x: Tensor, p: Tensor, stored: Tensor | None, shard: Shard) -> None:
        p.copy_(x)
        self.keep(x, p, stored)


def _scale(p: Tensor) -> float:
    return SCALE[str(p.dtype).removeprefix("torch.")]
