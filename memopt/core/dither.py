"""Counter-based dither for stochastic rounding.

The 32-bit word of an element at step t is

    mix(key ^ row) + col * 2^32 (sqrt 2 - 1) + t * 2^32 / golden ratio        (mod 2^32)

with ``key`` made of seed, parameter and moment, and rows and columns those of :mod:`memopt.core.rows`. It is a function
of these and of nothing else, so a run is reproducible bit for bit whatever the number of threads, the partition or
the device.

Rows begin at independent random words, so every single rounding is unbiased. Along a row and over steps the words are
rotations by irrational angles, sequences of low discrepancy, not fresh draws. Over steps: a moment that drifts by a
thousandth of a code's step per step then moves every thousandth step, almost regularly. With fresh draws it would move
at random times, and after thousands of steps the stored value would have wandered off like a random walk: after the
drop in ``tests/rules/test_drift.py``, elements of an 8-bit second moment end between 0.2 and 3.5 times the truth with
fresh draws. Along a row: neighbours round at different times, so the errors of a row nearly cancel, and a kernel pays
one addition for a word instead of a hash. No small integer relation ties the two angles: for |i|, |j| <= 10, i (sqrt 2
- 1) + j / golden ratio is 0.003 away from whole numbers.

A rotation comes back to nearly the same word after a Fibonacci number of steps. Where gradients have such a period the
same error is made again and again, and weights, which nothing draws back to where they should be, walk away with it.
The words of a master (``+stochastic``, ``+split``) therefore take the t of each eight steps in an order of their own
(:func:`shuffled`): no period is kept, and over all eight the words are those of the rotation. An error is drawn anew
for each period, so a weight walks no further than with fresh draws, and a steady update is followed as closely as by
the rotation. A moment that averages hundreds of steps meets the same number as often, and its words take the t of each
four steps so. A momentum forgets what was ten steps back, shows no period, and would lose what the evenness of the
rotation gives it (``Moment.turn`` in ``memopt/rules/base.py``).

The mixer is the 32-bit finaliser of MurmurHash3 (Appleby, public domain).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MASK = 0xFFFFFFFF
#: Steps that the words of a master, and of a moment but the momentum, take in an order of their own: powers of two.
SHUFFLED = 8
SHUFFLED_MOMENT = 4
C1 = 0x85EBCA6B
C2 = 0xC2B2AE35
#: 2^32 / golden ratio, odd.
GOLDEN = 0x9E3779B9
#: 2^32 (sqrt 2 - 1), odd: the rotation from one column to the next.
ALONG = 0x6A09E667


def mix(x: int) -> int:
    """MurmurHash3's finaliser on one 32-bit word."""
    x &= MASK
    x = ((x ^ (x >> 16)) * C1) & MASK
    x = ((x ^ (x >> 13)) * C2) & MASK
    return x ^ (x >> 16)


def key(*words: int) -> int:
    """One 32-bit key from integers, in order: ``k <- mix(k ^ (word + GOLDEN))``."""
    k = 0
    for word in words:
        k = mix(k ^ ((word + GOLDEN) & MASK))
    return k


def shuffled(step: int, count: int = SHUFFLED) -> int:
    """The steps b count … (b + 1) count - 1 in an order drawn from b: what a master's words take for t."""
    drawn = mix(step // count + GOLDEN)
    last = count - 1
    i = ((step ^ drawn) * (drawn >> 8 | 1)) & last
    i ^= i >> 1
    i = ((i ^ drawn >> 16) * (drawn >> 24 | 1)) & last
    return step - (step & last) + i


def _signed(x: int) -> int:
    x &= MASK
    return x - (1 << 32) if x >> 31 else x


def _mix(x: Tensor) -> Tensor:
    """``mix`` on an int32 tensor, in place; multiplication wraps, shifts are made logical by a mask."""
    x.bitwise_xor_((x >> 16) & 0xFFFF).mul_(_signed(C1))
    x.bitwise_xor_((x >> 13) & 0x7FFFF).mul_(_signed(C2))
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def words(k: int, first_row: int, rows: int, cols: int, device: object) -> Tensor:
    """Words that are each drawn alone, mix(mix(key ^ row) ^ col * 2^32 / golden ratio); int32 [rows, cols], rows
    counted from ``first_row``."""
    import torch

    row = bits(k, 0, first_row, rows, 1, device)
    col = torch.arange(cols, dtype=torch.int32, device=device).mul_(_signed(GOLDEN))  # type: ignore[call-overload]
    return _mix(row ^ col)


def bits(k: int, step: int, first_row: int, rows: int, cols: int, device: object) -> Tensor:
    """The words, int32 [rows, cols]; rows are counted from ``first_row``."""
    import torch

    row: Tensor = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)  # type: ignore[call-overload]
    row = (row & MASK) ^ k
    row = torch.where(row >= 1 << 31, row - (1 << 32), row).to(torch.int32)
    col = torch.arange(cols, dtype=torch.int32, device=device).mul_(_signed(ALONG))  # type: ignore[call-overload]
    words: Tensor = _mix(row).add_(_signed(step * GOLDEN))[:, None] + col
    return words
