"""``stochastic``: the weights are rounded up or down at random, in proportion; nothing is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from memopt.masters.base import Bare, words
from memopt.masters.pattern import from_pattern, shift_of, to_pattern

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.formats.base import Shard


@final
class Stochastic(Bare):
    """No bytes beside the parameter::

        p <- the neighbour of x below, or above with probability (x - below) / (above - below)

    so the expected value of p is x, and an update of a tenth of a unit in the last place moves the weight every tenth
    step. The uniform numbers are the dither of :mod:`memopt.core.dither`, a function of seed, parameter, row, column
    and step: the same whatever the number of threads or ranks. A single weight is off by up to one unit in the last
    place, twice the error of rounding to nearest.

    Source: Gupta et al., "Deep learning with limited numerical precision", ICML 2015; for bf16 weights Zamirai et
    al., "Revisiting BFloat16 training", 2020.
    """

    name = "stochastic"
    summary = "stochastic rounding of the weights, no bytes"
    dithered = True

    def write(self, x: Tensor, p: Tensor, stored: Tensor | None, shard: Shard) -> None:
        shift = shift_of(p.dtype)
        pattern = to_pattern(x, p.dtype)
        uniform = (words(shard, x) >> (32 - shift)) & ((1 << shift) - 1)
        p.copy_(from_pattern(((pattern + uniform) >> shift) << shift, x, p.dtype))
