"""The rules of :mod:`memopt.rules`, one tile of elements at a time.

    rule(p, g, v, m, x, c, M, X, FACTORED, PRECISE) -> p, v, m, x

v is the second moment, m the signed moment, x what else there is (the largest second moment, CAME's residual,
RMSprop's centre, AdEMAMix's slow mean); M and X say whether the rule keeps them. c are the numbers of this step
(``fields.py``). FACTORED: v is what the new means say, so it is not updated here; Adafactor and CAME then take
1 / sqrt(v), and of x likewise.
"""

from typing import Any

import triton
import triton.language as tl

from memopt.kernels.triton.device import fields as f


@triton.jit
def root(x, PRECISE: tl.constexpr):
    return tl.sqrt_rn(x) if PRECISE else tl.sqrt(x)


#: The square of this is still a normal number.
_LEAST = tl.constexpr(2.0**-63)


@triton.jit
def over(a, b, PRECISE: tl.constexpr, GUARD: tl.constexpr = True):
    """a / b for b >= 0; where that is not to be correctly rounded, in few instructions instead of seven. GUARD: b may
    be under 2^-63."""
    if PRECISE:
        return tl.div_rn(a, b)
    if GUARD:
        b = tl.maximum(b, _LEAST, propagate_nan=tl.PropagateNan.ALL)
    return a * tl.rsqrt(b * b)


@triton.jit
def denominator(v, c, PRECISE: tl.constexpr):
    """sqrt(v) / bias + eps, for :func:`over` without GUARD: instead of each sum, eps is kept from being too small."""
    eps = c[f.EPS] if PRECISE else tl.maximum(c[f.EPS], _LEAST)
    return tl.fma(root(v, PRECISE), c[f.INVERSE_BIAS], eps)


@triton.jit
def bounded(u, c, FACTORED: tl.constexpr):
    """Where the second moment does not know the element (``memopt/rules/adamw.py``)."""
    if FACTORED:
        u = tl.where(u > c[f.LONGEST], c[f.LONGEST], u)
        u = tl.where(u < -c[f.LONGEST], -c[f.LONGEST], u)
    return u


@triton.jit
def lerp(a, b, c, WEIGHT: tl.constexpr):
    return tl.fma(b - a, c[WEIGHT], tl.where(c[WEIGHT + 1] != 0, b, a))


@triton.jit
def with_decay(g, p, c):
    return tl.fma(p, c[f.L2], g)


@triton.jit
def second_moment(v, g, c):
    return tl.fma(c[f.REST2] * g, g, v * c[f.B2])


@triton.jit
def raw_update(g, v, c, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    """Adafactor's and CAME's second moment, and the update before it is clipped."""
    if FACTORED:
        return g * tl.where(v > c[f.CEILING], c[f.CEILING], v), v
    v = lerp(v, g * g + c[f.EPS_ADDED], c, f.SECOND)
    bounded = tl.where(v < c[f.FLOOR], c[f.FLOOR], v)
    return over(g, root(bounded, PRECISE), PRECISE), v


@triton.jit
def adam(p, g, v, m, x, c, M: tl.constexpr, X: tl.constexpr, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    return adamw(p, with_decay(g, p, c), v, m, x, c, M, X, FACTORED, PRECISE)


@triton.jit
def adamw(p, g, v, m, x, c, M: tl.constexpr, X: tl.constexpr, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    m = lerp(m, g, c, f.FIRST)
    if not FACTORED:
        v = second_moment(v, g, c)
    below = v
    if X:
        x = tl.where((v > x) | (v != v), v, x)
        below = x
    update = bounded(over(m * c[f.RATE], denominator(below, c, PRECISE), PRECISE, False), c, FACTORED)
    return tl.fma(p, c[f.DECAY], update), v, m, x


@triton.jit
def radam(p, g, v, m, x, c, M: tl.constexpr, X: tl.constexpr, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    p = p * c[f.DECAY]
    g = with_decay(g, p, c)
    m = lerp(m, g, c, f.FIRST)
    if not FACTORED:
        v = second_moment(v, g, c)
    adaptive = p + bounded(over(m * c[f.RATE], root(v, PRECISE) + c[f.EPS], PRECISE), c, FACTORED)
    return tl.where(c[f.PLAIN] != 0, tl.fma(m, c[f.RATE], p), adaptive), v, m, x


@triton.jit
def lion(p, g, v, m, x, c, M: tl.constexpr, X: tl.constexpr, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    towards = lerp(m, g, c, f.FIRST)
    step = tl.where(towards > 0, c[f.RATE_LR], tl.where(towards < 0, -c[f.RATE_LR], 0.0))
    return p * c[f.DECAY] - step, v, lerp(m, g, c, f.SECOND), x


@triton.jit
def sgd(p, g, v, m, x, c, M: tl.constexpr, X: tl.constexpr, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    g = with_decay(g, p, c)
    if M:
        m = tl.fma(g, c[f.DAMP], m * c[f.CARRIED])
        g = tl.where(c[f.LOOK_AHEAD] != 0, tl.fma(m, c[f.MU], g), m)
    return tl.fma(g, -c[f.RATE_LR], p), v, m, x


@triton.jit
def rmsprop(p, g, v, m, x, c, M: tl.constexpr, X: tl.constexpr, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    g = with_decay(g, p, c)
    if not FACTORED:
        v = second_moment(v, g, c)
    variance = v
    if X:
        x = lerp(x, g, c, f.SECOND)
        variance = tl.fma(-x, x, v)
        variance = tl.where(variance < 0, 0.0, variance)
    below = root(variance, PRECISE) + c[f.EPS]
    if M:
        m = m * c[f.MU] + over(g, below, PRECISE)
        p = tl.fma(m, -c[f.RATE_LR], p)
    else:
        p = p + over(g * -c[f.RATE_LR], below, PRECISE)
    return p, v, m, x


@triton.jit
def adafactor(p, g, v, m, x, c, M: tl.constexpr, X: tl.constexpr, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    u, v = raw_update(g, v, c, FACTORED, PRECISE)
    u = u * c[f.UPDATE_SCALE]
    if M:
        m = lerp(m, u, c, f.FIRST)
        u = m
    p = p * c[f.DECAY]
    return p - p * c[f.SHRINK] - u, v, m, x


@triton.jit
def came(p, g, v, m, x, c, M: tl.constexpr, X: tl.constexpr, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    """X: matrices. Of a factored state x is that of this step, which the pass before has averaged."""
    u, v = raw_update(g, v, c, FACTORED, PRECISE)
    u = u * c[f.UPDATE_SCALE]
    m = lerp(m, u, c, f.FIRST)
    if X and not FACTORED:
        x = lerp(x, (u - m) * (u - m) + c[f.EPS_RESIDUAL], c, f.THIRD)
    step = m
    if X:
        step = m * x if FACTORED else over(m, root(x, PRECISE), PRECISE)
    return tl.fma(step, -c[f.RATE_LR], p * c[f.DECAY]), v, m, x


@triton.jit
def adabound(p, g, v, m, x, c, M: tl.constexpr, X: tl.constexpr, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    g = with_decay(g, p, c)
    m = lerp(m, g, c, f.FIRST)
    if not FACTORED:
        v = second_moment(v, g, c)
    rate = over(c[f.RATE], root(v, PRECISE) + c[f.EPS], PRECISE)
    rate = tl.where(rate < c[f.FLOOR], c[f.FLOOR], rate)
    rate = tl.where(rate > c[f.CEILING], c[f.CEILING], rate)
    return p - rate * m, v, m, x


@triton.jit
def ademamix(p, g, v, m, x, c, M: tl.constexpr, X: tl.constexpr, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    m = lerp(m, g, c, f.FIRST)
    x = lerp(x, g, c, f.THIRD)
    if not FACTORED:
        v = second_moment(v, g, c)
    mean = tl.fma(x, c[f.MIXED], m * c[f.FIRST_BIAS])
    update = bounded(over(mean * c[f.RATE], denominator(v, c, PRECISE), PRECISE, False), c, FACTORED)
    return tl.fma(p, c[f.DECAY], update), v, m, x


@triton.jit
def sum_clipped(p, g, v, m, c, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    """What is squared and summed over a tensor before its step. Here the update before it is clipped."""
    u, _v = raw_update(g, v, c, FACTORED, PRECISE)
    return u


@triton.jit
def sum_lamb(p, g, v, m, c, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    """LAMB's update, whose size and the parameter's are compared."""
    m = lerp(m, g, c, f.FIRST)
    if not FACTORED:
        v = second_moment(v, g, c)
    return tl.fma(p, c[f.SHRINK], over(m * c[f.FIRST_BIAS], denominator(v, c, PRECISE), PRECISE, False))


@triton.jit
def sum_surprise(p, g, v, m, c, FACTORED: tl.constexpr, PRECISE: tl.constexpr):
    """What StableAdamW clips by: the gradient as a multiple of what the second moment says."""
    if not FACTORED:
        v = second_moment(v, g, c)
    expected = root(v, PRECISE) * c[f.INVERSE_BIAS]
    return over(g, tl.where(expected < c[f.EPS], c[f.EPS], expected), PRECISE)


@triton.jit
def renew_adam(p, g, v, c):
    """What a factored second moment becomes, element by element; its means are kept. One for each rule that has it."""
    return second_moment(v, with_decay(g, p * c[f.DECAY], c), c)


@triton.jit
def renew_adafactor(p, g, v, c):
    return lerp(v, g * g + c[f.EPS_ADDED], c, f.SECOND)


#: rule -> its function, and how a factored second moment is renewed. LAMB's and StableAdamW's step is AdamW's, with the
#: decay and the rate that follow from sums; so is Adam-mini's, with row means that were renewed before.
STEPS: dict[str, Any] = {
    "adam": adam,
    "adamw": adamw,
    "radam": radam,
    "lion": lion,
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adafactor": adafactor,
    "came": came,
    "adabound": adabound,
    "ademamix": ademamix,
    "adammini": adamw,
    "lamb": adamw,
    "stableadamw": adamw,
}
#: rule -> what it sums over a tensor first, and whether that takes the signed moment.
SUMS: dict[str, tuple[Any, bool]] = {
    "adafactor": (sum_clipped, False),
    "came": (sum_clipped, False),
    "lamb": (sum_lamb, True),
    "stableadamw": (sum_surprise, False),
}
RENEWALS: dict[str, Any] = {
    "adam": renew_adam,
    "adamw": renew_adam,
    "radam": renew_adam,
    "rmsprop": renew_adam,
    "adafactor": renew_adafactor,
    "came": renew_adafactor,
    "adabound": renew_adam,
    "ademamix": renew_adam,
    "lamb": renew_adam,
    "stableadamw": renew_adam,
}
