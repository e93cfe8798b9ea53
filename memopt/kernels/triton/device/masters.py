"""The masters of :mod:`memopt.masters`: the precise value of a 16-bit parameter is read, and rounded again.

``stored`` is what stands beside the parameter: fp32 copy, compensation, or correction. The pattern of an fp32 number
(``memopt/masters/pattern.py``) has 16 bits below bf16's last, and 13 below fp16's.
"""

import triton
import triton.language as tl

from memopt.kernels.triton.device.codes import bits, number, rounded
from memopt.masters import kahan

NONE, COPY, KAHAN, STOCHASTIC, SPLIT8, SPLIT16 = (tl.constexpr(i) for i in range(6))
KINDS = {"none": NONE, "fp32": COPY, "kahan": KAHAN, "stochastic": STOCHASTIC, "split": SPLIT8, "split16": SPLIT16}
#: Masters whose rounding takes the dither's words.
DITHERED = ("stochastic", "split")
#: dtype of ``stored``; of a compensation it is the parameter's.
TYPES = {"none": tl.int8, "fp32": tl.float32, "stochastic": tl.int8, "split": tl.int8, "split16": tl.int16}

_SLACK = tl.constexpr(kahan.SLACK)
_SCALE = tl.constexpr(kahan.SCALE["float16"])
_INF = tl.constexpr(float("inf"))


@triton.jit
def has_pattern(x, TYPE: tl.constexpr):
    return tl.abs(x) < (_INF if TYPE == tl.bfloat16 else 65536.0)


@triton.jit
def to_pattern(x, TYPE: tl.constexpr):
    """int32 >= 0; 0 for NaN, infinities and what is beyond fp16's range."""
    size = tl.abs(x) if TYPE == tl.bfloat16 else tl.abs(x) * 2.0**-112
    return bits(tl.where(has_pattern(x, TYPE), size, 0.0))


@triton.jit
def from_pattern(pattern, x, TYPE: tl.constexpr):
    """fp32 of the patterns with the signs of ``x``; ``x`` itself where it has no pattern."""
    value = number(pattern) if TYPE == tl.bfloat16 else number(pattern) * 2.0**112
    value = number(bits(value) | (bits(x) & -2147483648))
    return tl.where(has_pattern(x, TYPE), value, x)


@triton.jit
def read_master(p, stored, MASTER: tl.constexpr, TYPE: tl.constexpr):
    """x, fp32, of the parameter p (as fp32) and ``stored``; p where that is of another weight."""
    x = p
    if MASTER == COPY:
        x = tl.where(rounded(stored, TYPE).to(tl.float32) == p, stored, p)
    elif MASTER == KAHAN:
        c = stored.to(tl.float32) if TYPE == tl.bfloat16 else stored.to(tl.float32) * (1.0 / _SCALE)
        own = rounded(p + c * _SLACK, TYPE).to(tl.float32) == p
        x = tl.where(own, p + c, p)
    elif MASTER == SPLIT8 or MASTER == SPLIT16:
        rest = stored.to(tl.int32)
        drop: tl.constexpr = (8 if TYPE == tl.bfloat16 else 5) if MASTER == SPLIT8 else 0
        value = from_pattern(tl.maximum(to_pattern(p, TYPE) + (rest << drop), 0), p, TYPE)
        x = tl.where((rest < 0) & (p == 0), p, value)
    return x


@triton.jit
def write_master(x, w, MASTER: tl.constexpr, TYPE: tl.constexpr):
    """The parameter of this dtype, and ``stored``, for x; ``w`` are the dither's words."""
    stored = x
    if MASTER == KAHAN:
        c = x - rounded(x, TYPE).to(tl.float32)
        c = c if TYPE == tl.bfloat16 else c * _SCALE
        stored = rounded(tl.where(tl.abs(c) < _INF, c, 0.0), TYPE)
    elif MASTER == STOCHASTIC:
        shift: tl.constexpr = 16 if TYPE == tl.bfloat16 else 13
        up = (to_pattern(x, TYPE) + (w >> (32 - shift)).to(tl.int32)) >> shift
        x = from_pattern(up << shift, x, TYPE)
    elif MASTER == SPLIT8:
        dropped: tl.constexpr = 8 if TYPE == tl.bfloat16 else 5
        q = (to_pattern(x, TYPE) + (w >> (32 - dropped)).to(tl.int32)) >> dropped
        upper = (q + 128) >> 8
        stored = (q - (upper << 8)).to(tl.int8)
        x = from_pattern(upper << (8 + dropped), x, TYPE)
    elif MASTER == SPLIT16:
        k: tl.constexpr = 16 if TYPE == tl.bfloat16 else 13
        q = to_pattern(x, TYPE)
        upper = (q + (1 << (k - 1))) >> k
        stored = (q - (upper << k)).to(tl.int16)
        x = from_pattern(upper << k, x, TYPE)
    return rounded(x, TYPE), stored
