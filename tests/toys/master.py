"""A copy of the weights in fp32 that only counts where it rounds to the weight."""

from typing import final

import torch

from memopt.masters.base import Master


@final
class Copy(Master):
    """``toy`` fp32 in the parameter's shape."""

    name = "toycopy"
    summary = "a master of a test, 4 bytes per parameter"
    key = "toy"

    def stored_dtype(self, dtype):
        return "float32"

    def read(self, p, kept):
        return torch.where(self.foreign(p, kept), p.float(), kept)

    def foreign(self, p, kept):
        return kept.to(p.dtype) != p

    def keep(self, x, p, kept):
        kept.copy_(torch.where(x.to(p.dtype) == p, x, p.float()))

    def write(self, x, p, kept, shard):
        p.copy_(x)
        kept.copy_(x)
