"""``split`` and ``split16``: the weight is the upper bits of a longer number, the correction its lower bits."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, final

from memopt.masters.base import Master, words
from memopt.masters.pattern import from_pattern, shift_of, to_pattern

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memopt.formats.base import Shard


class _Split(Master):
    """A long number in the bits of :mod:`memopt.masters.pattern`, cut in two. Of its magnitude q, an integer::

        p's magnitude  = (q + 2^(k-1)) >> k         (nearest, ties away from zero)
        correction     = q - (p's magnitude << k)   (from -2^(k-1) to 2^(k-1) - 1)

    so weight and correction together are q again, bit for bit.
    """

    key = "correction"
    BITS: ClassVar[int]  # of the correction

    @abstractmethod
    def _shorten(self, pattern: Tensor, drop: int, shard: Shard, x: Tensor) -> Tensor:
        """q: the pattern without its ``drop`` last bits, int32."""

    def stored_dtype(self, dtype: str) -> str:
        return f"int{self.BITS}"

    def _widths(self, dtype: torch.dtype) -> tuple[int, int]:
        """k, and the bits of the pattern that have no place in the correction."""
        k = min(self.BITS, shift_of(dtype))
        return k, shift_of(dtype) - k

    def read(self, p: Tensor, stored: Tensor | None) -> Tensor:
        import torch

        assert stored is not None
        _, drop = self._widths(p.dtype)
        weight = p.float()
        q = to_pattern(weight, p.dtype).add_(stored.int() << drop)
        return torch.where(self.foreign(p, stored), weight, from_pattern(q.clamp_(min=0), weight, p.dtype))

    def foreign(self, p: Tensor, stored: Tensor) -> Tensor:
        return (stored < 0) & (p == 0)

    def keep(self, x: Tensor, p: Tensor, stored: Tensor | None) -> None:
        assert stored is not None
        k, drop = self._widths(p.dtype)
        weight = p.float()
        q = (to_pattern(x, p.dtype) + ((1 << drop) >> 1)) >> drop
        rest = q.sub_(to_pattern(weight, p.dtype) >> drop).clamp_(-(1 << (k - 1)), (1 << (k - 1)) - 1)
        stored.copy_(rest.mul_(weight.isfinite() & (weight.signbit() == x.signbit())))

    def write(self, x: Tensor, p: Tensor, stored: Tensor | None, shard: Shard) -> None:
        assert stored is not None
        k, drop = self._widths(p.dtype)
        q = self._shorten(to_pattern(x, p.dtype), drop, shard, x)
        upper = (q + (1 << (k - 1))) >> k
        p.copy_(from_pattern(upper << (k + drop), x, p.dtype))
        stored.copy_(q.sub_(upper << k))


@final
class Split(_Split):
    """``correction`` int8 in the parameter's shape, 1 byte per parameter.

    bf16 and 8 bits are a 24-bit float with fp32's exponent and 16 significant bits; fp16 and 8 bits have 19. The bits
    beyond are rounded stochastically with the dither of :mod:`memopt.core.dither`, so that updates too small even for
    the longer number are not lost either.

    Source: the layout of flashoptim's 24-bit weights (Databricks 2025), whose correction is the rounding error in units
    of 1/127 of half a unit in the last place; here it is the following bits themselves, so that it decodes exactly.
    """

    name = "split"
    summary = "8 more bits of each weight, 1 byte per parameter"
    dithered = True
    BITS = 8

    def _shorten(self, pattern: Tensor, drop: int, shard: Shard, x: Tensor) -> Tensor:
        return (pattern + ((words(shard, x) >> (32 - drop)) & ((1 << drop) - 1))) >> drop


@final
class Split16(_Split):
    """``correction`` int16 in the parameter's shape, 2 bytes per parameter.

    bf16 and 16 bits are fp32, bit for bit: ``+split16`` is ``+fp32`` for half its bytes, but for ties, which round
    away from zero. fp16 needs 13 of the 16 bits for the same.

    Source: Kalamkar et al., "A study of BFLOAT16 for deep learning training", 2019 (Split-SGD-BF16).
    """

    name = "split16"
    summary = "16 more bits of each weight, 2 bytes per parameter: all of fp32"
    BITS = 16

    def _shorten(self, pattern: Tensor, drop: int, shard: Shard, x: Tensor) -> Tensor:
        return pattern
