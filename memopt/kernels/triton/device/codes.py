"""The element codes of :mod:`memopt.formats`: a tile of a moment is loaded and decoded, encoded and stored.

A tile is ``[blocks, WIDTH]``: blocks of the format, each within one row; where moments are in several formats, as wide
as the widest of their blocks. ``scale`` is [blocks, 1], or [blocks, WIDTH] where a block is narrower than the tile.
Formulas are those of ``memopt/formats/blockwise.py``, ``fp8.py`` and ``bf16.py``; where a polynomial is evaluated in
another order or a root is approximate, a rounding tie may fall otherwise (``docs/kernels.md``).
"""

import os

import triton
import triton.language as tl

from memopt.formats import blockwise, fp8, int4, int8
from memopt.kernels.triton.device.dither import uniform32

#: What a moment is kept as.
FULL, HALF, BYTES, FP8, NIBBLES = (tl.constexpr(i) for i in range(5))
#: Elements of a block of NIBBLES; of the other codes a block is twice as wide.
NARROW = tl.constexpr(int4.CODE.block)
KINDS = {"32bit": FULL, "bf16": HALF, "8bit": BYTES, "fp8": FP8, "4bit": NIBBLES}

_FLT_MAX = tl.constexpr(blockwise.FLT_MAX)
_LARGEST = tl.constexpr(fp8.LARGEST)
_SLOPE = tl.constexpr(int4.SLOPE * 2.0**-32)
_ROOT = tl.constexpr(int4.ROOT)
_POWERS_SHIFT, _POWERS_OFFSET = (tl.constexpr(i) for i in (int4.SHIFT, int4.OFFSET))
_SHIFT, _SUM, _PLACES, _LEAST = (tl.constexpr(i) for i in (int8.SHIFT, int8.SUM, int8.PLACES, int8.LEAST))
_NOTHING = tl.constexpr(int8.NOTHING)
_BELOW_ONE = tl.constexpr(blockwise.BELOW_ONE)
_SIGN = tl.constexpr(-(2**31))
#: Triton's interpreter cuts off where it should round to bf16.
_CUTS = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def number(b):
    return b.to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """fp32 to a parameter's dtype, to nearest even."""
    if _CUTS and tl.bfloat16 == TYPE:
        b = bits(x)
        b = b + 0x7FFF + ((b >> 16) & 1)
        x = tl.where(x == x, number(b & -65536), x)
    return x.to(TYPE)


@triton.jit
def reciprocal(scale, numerator: tl.constexpr):
    """numerator / scale, not above the largest fp32; a NaN stays. By the root's approximate instruction, 4e-7 off at
    most: a division takes three times as many instructions, and every thread needs it for every block."""
    r = tl.rsqrt(scale)
    return tl.minimum(r * r * numerator, _FLT_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, SIGNED: tl.constexpr):
    """The largest magnitude of each block; a block with a NaN has NaN, as integers above Inf. Of what is never negative
    no sign is taken off: only a NaN can have one, and is still above everything."""
    magnitude = tl.abs(x) if SIGNED else x
    return tl.max(magnitude.to(tl.uint32, bitcast=True), 1).to(tl.float32, bitcast=True)


@triton.jit
def decode_signed(q, scale, LEVELS: tl.constexpr):
    """q in -LEVELS … LEVELS stands for sign(q) (q / LEVELS)² scale."""
    x = q.to(tl.float32)
    return x * tl.abs(x) * (scale * (1.0 / (LEVELS * LEVELS)))


@triton.jit
def encode_signed(x, scale, w, LEVELS: tl.constexpr):
    """With v = 1 - u, q + 1 is chosen where y > q² + u (2 q + 1): where q + 1 <= sqrt(y - v + v²) + v.

    Where there is no root y is under v, and q is 0. v is kept under 1, so that 0 stays 0.
    """
    v = tl.fma(uniform32(w), -(2.0**-32), 1 - 2.0**-24)
    above = tl.fma(tl.abs(x), reciprocal(scale, LEVELS * LEVELS * 1.0), -v)  # y - v
    q = tl.minimum(tl.sqrt(tl.maximum(tl.fma(v, v, above), 0.0)) + v, LEVELS * 1.0)
    return number(bits(q) | (bits(x) & _SIGN)).to(tl.int32)


@triton.jit
def decode_powers(q, scale):
    """q in 0 … 15, of ``memopt/formats/int4.py``: the exponent of an fp32 number."""
    return tl.where(q > 0, number((q + _POWERS_OFFSET) << _POWERS_SHIFT), 0.0) * scale


@triton.jit
def encode_powers(x, scale, w):
    y = x * reciprocal(scale, 1.0 - 2.0**-21)  # not above 1, where the reciprocal is
    factor: tl.constexpr = 2.0**_POWERS_SHIFT * _BELOW_ONE
    h = tl.fma(uniform32(w), -_SLOPE, _ROOT)
    added = tl.fma(h * h * (h * h), -factor, 2 * factor).to(tl.int32)
    q = ((bits(y) + added) >> _POWERS_SHIFT) - _POWERS_OFFSET
    return tl.maximum(q, tl.minimum(bits(x), 1))  # 0 for 0 alone


@triton.jit
def decode_tapered(q, scale):
    """q in 0 … 255, of ``memopt/formats/int8.py``."""
    z = number(-(q << _SHIFT) + _PLACES).to(tl.int32)
    return tl.where(q > 0, number(-z + _SUM), 0.0) * scale


@triton.jit
def encode_tapered(x, scale, w):
    y = x * reciprocal(scale, 1.0 - 2.0**-21)  # not above 1, where the reciprocal is
    z = bits((-tl.maximum(bits(y), _LEAST) + _SUM).to(tl.float32))
    q = (-z + _PLACES + (w >> (32 - _SHIFT)).to(tl.int32)) >> _SHIFT
    return tl.where(y < _NOTHING, 0, q)  # not of a NaN


@triton.jit
def decode_fp8(q, scale):
    """float8_e4m3fn from its bits, so that cards without the type read it too."""
    body = q & 0x7F
    x = tl.where(body >= 8, number((body << 20) + (120 << 23)), body.to(tl.float32) * 2.0**-9)
    return number(bits(x) | ((q & 0x80) << 24)) * scale


@triton.jit
def encode_fp8(x, scale, w, SIGNED: tl.constexpr):
    y = tl.minimum(tl.abs(x) * reciprocal(scale, _LARGEST), _LARGEST)
    if not SIGNED:
        octave = tl.maximum(bits(y) >> 23, 121)
        steps = y * number((257 - octave) << 23)
        u = uniform32(w) * 2.0**-32
        bend = (1.0 - u) * u * 0.375 / tl.maximum(steps, 1.0)
        q = tl.fma(u + bend, _BELOW_ONE, steps).to(tl.int32) + ((octave - 121) << 3)
        return tl.maximum(q, tl.minimum(bits(y), 1))
    normal = ((bits(y) + (w >> 12).to(tl.int32)) >> 20) - (120 << 3)
    small = tl.fma(y, 512.0, uniform32(w) * 2.0**-32).to(tl.int32)
    q = tl.where(y >= 2.0**-6, normal, small)
    return q | ((bits(x) >> 24) & 0x80)


@triton.jit
def pointer(address, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """An address as a pointer, with what is known of its alignment: before the cast the hint would be lost."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), ALIGN)


@triton.jit
def decode(q, scale, KIND: tl.constexpr, SIGNED: tl.constexpr):
    """Codes, of NIBBLES 0 … 15, as numbers."""
    if KIND == FP8:
        return decode_fp8(q, scale)
    if KIND == NIBBLES:
        if SIGNED:
            return decode_signed((q << 28) >> 28, scale, 7)
        return decode_powers(q, scale)
    if SIGNED:
        return decode_signed((q << 24) >> 24, scale, 127)
    return decode_tapered(q, scale)


@triton.jit
def load_moment(
    data, aux, where, mask, KIND: tl.constexpr, SIGNED: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr
):
    """fp32 [blocks, WIDTH], zeros outside ``mask``.

    data, aux: addresses of the codes and of the scales; where: of :func:`elementwise.place`, the int64 offsets of the
    elements and of the bytes of packed codes, the places of the blocks' scales, and which of all these there are.
    """
    at, half_at, half_live, block, narrow, live = where
    if KIND == FULL:
        return tl.load(pointer(data, tl.float32, ALIGN) + at, mask=mask, other=0.0)
    if KIND == HALF:
        raw = tl.load(pointer(data, tl.int16, ALIGN) + at, mask=mask, other=0)
        return number(raw.to(tl.int32) << 16)
    scales = pointer(aux, tl.float32, 4)
    if KIND == NIBBLES:
        pair = tl.load(pointer(data, tl.uint8, ALIGN) + half_at, mask=half_live, other=0).to(tl.int32)
        q = tl.interleave(pair & 15, pair >> 4)
        if WIDTH > NARROW:
            return decode(
                q,
                tl.load(scales + (narrow[:, None] + tl.arange(0, WIDTH)[None, :] // NARROW), mask=mask, other=0.0),
                KIND,
                SIGNED,
            )
    else:
        q = tl.load(pointer(data, tl.uint8, ALIGN) + at, mask=mask, other=0).to(tl.int32)
    return decode(q, tl.load(scales + block, mask=live, other=0.0)[:, None], KIND, SIGNED)


@triton.jit
def load_anywhere(data, aux, at, mask, cols, KIND: tl.constexpr):
    """A signed moment at these offsets, in a tile that does not go by the rows of ``cols`` elements in which its blocks
    are."""
    if KIND == FULL:
        return tl.load(pointer(data, tl.float32, 4) + at, mask=mask, other=0.0)
    if KIND == HALF:
        raw = tl.load(pointer(data, tl.int16, 2) + at, mask=mask, other=0)
        return number(raw.to(tl.int32) << 16)
    row = at // cols
    column = at - row * cols
    BLOCK: tl.constexpr = NARROW if KIND == NIBBLES else 256
    scale = tl.load(
        pointer(aux, tl.float32, 4) + row * ((cols + BLOCK - 1) // BLOCK) + column // BLOCK, mask=mask, other=0.0
    )
    codes = pointer(data, tl.uint8, 1)
    if KIND == NIBBLES:
        pair = tl.load(codes + row * ((cols + 1) // 2) + column // 2, mask=mask, other=0).to(tl.int32)
        q = (pair >> ((column & 1) * 4).to(tl.int32)) & 15
    else:
        q = tl.load(codes + at, mask=mask, other=0).to(tl.int32)
    return decode(q, scale, KIND, True)


@triton.jit
def encode(x, scale, w, KIND: tl.constexpr, SIGNED: tl.constexpr):
    if KIND == FP8:
        return encode_fp8(x, scale, w, SIGNED)
    if KIND == NIBBLES:
        return encode_signed(x, scale, w, 7) if SIGNED else encode_powers(x, scale, w)
    return encode_signed(x, scale, w, 127) if SIGNED else encode_tapered(x, scale, w)


@triton.jit
def store_moment(
    data, aux, where, mask, x, w, KIND: tl.constexpr, SIGNED: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr
):
    """The inverse of :func:`load_moment`, rounded with the words ``w``; ``x`` is zero outside ``mask``."""
    at, half_at, half_live, block, narrow, live = where
    if KIND == FULL:
        tl.store(pointer(data, tl.float32, ALIGN) + at, x, mask=mask)
    elif KIND == HALF:
        # A card's NaN has all bits set: with anything added it would be -0.
        upper = tl.where(x == x, (bits(x).to(tl.uint32) + (w >> 16)) >> 16, 0x7FC0)
        tl.store(pointer(data, tl.int16, ALIGN) + at, upper.to(tl.int16), mask=mask)
    elif KIND == NIBBLES and WIDTH > NARROW:
        PARTS: tl.constexpr = WIDTH // NARROW
        rows: tl.constexpr = x.shape[0]
        scale = largest(tl.reshape(x, (rows * PARTS, NARROW)), SIGNED)
        wide = tl.reshape(tl.broadcast_to(scale[:, None], (rows * PARTS, NARROW)), (rows, WIDTH))
        store_halves(data, half_at, half_live, encode(x, wide, w, KIND, SIGNED), ALIGN)
        part = tl.arange(0, WIDTH)[None, :]
        # By the first element of each narrow block.
        begins = mask & (part % NARROW == 0)
        tl.store(pointer(aux, tl.float32, 4) + (narrow[:, None] + part // NARROW), wide, mask=begins)
    else:
        scale = largest(x, SIGNED)
        q = encode(x, scale[:, None], w, KIND, SIGNED)
        if KIND == NIBBLES:
            store_halves(data, half_at, half_live, q, ALIGN)
        else:
            tl.store(pointer(data, tl.uint8, ALIGN) + at, q.to(tl.uint8), mask=mask)
        if KIND == FP8:
            scale = tl.div_rn(scale, _LARGEST)
        tl.store(pointer(aux, tl.float32, 4) + block, scale, mask=live)


@triton.jit
def store_halves(data, half_at, half_live, q, ALIGN: tl.constexpr):
    low, high = tl.split(tl.reshape(q, (q.shape[0], q.shape[1] // 2, 2)))
    pair = ((low & 15) | ((high & 15) << 4)).to(tl.uint8)
    tl.store(pointer(data, tl.uint8, ALIGN) + half_at, pair, mask=half_live)
