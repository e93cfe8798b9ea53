"""The dither of :mod:`memopt.core.dither` on the device."""

import triton
import triton.language as tl

from memopt.core import dither

_C1 = tl.constexpr(dither.C1)
_C2 = tl.constexpr(dither.C2)
_GOLDEN = tl.constexpr(dither.GOLDEN)
_ALONG = tl.constexpr(dither.ALONG)
#: In how many steps the turns of a master come, and those of a moment but the momentum.
MASTER_TURNS, MOMENT_TURNS = tl.constexpr(dither.SHUFFLED), tl.constexpr(dither.SHUFFLED_MOMENT)


@triton.jit
def mix(x):
    """MurmurHash3's finaliser on uint32."""
    x = (x ^ (x >> 16)) * _C1
    x = (x ^ (x >> 13)) * _C2
    return x ^ (x >> 16)


@triton.jit
def shuffled(step, COUNT: tl.constexpr):
    """The steps of words, uint32: so many at a time in an order of their own."""
    step = step.to(tl.uint32)
    last: tl.constexpr = COUNT - 1
    drawn = mix(step // COUNT + _GOLDEN)
    i = ((step ^ drawn) * ((drawn >> 8) | 1)) & last
    i = i ^ (i >> 1)
    i = ((i ^ (drawn >> 16)) * ((drawn >> 24) | 1)) & last
    return step - (step & last) + i


@triton.jit
def words(
    key,  # uint32: of the parameter's moment
    step,  # int32: the number of this step; of all but a momentum ``shuffled``
    row,  # int32 [blocks]: of the whole parameter
    first,  # int32 [blocks]: column with which the block begins
    WIDTH: tl.constexpr,
):
    """The words of blocks of one row each, uint32 [blocks, WIDTH]."""
    start = mix(row.to(tl.uint32) ^ key) + step.to(tl.uint32) * _GOLDEN + first.to(tl.uint32) * _ALONG
    return start[:, None] + (tl.arange(0, WIDTH).to(tl.uint32) * _ALONG)[None, :]


@triton.jit
def uniform32(w):
    """2^32 times the uniform number. The plain path takes 24 bits of the word, this the nearest fp32 number: they are
    less than 2^-24 apart."""
    return w.to(tl.float32)
