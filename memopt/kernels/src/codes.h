// The element codes of memopt/formats/blockwise.py and fp8.py, one struct each:
//   unit(stored)      what a decoded code is multiplied by
//   stored(largest)   what is kept of the largest magnitude of a block
//   inverse(largest)  what a value is multiplied by before it is coded
//   decode, encode    one vector
//   HAS_SIGN          whether values may be negative
// Formulas are those of the Python files; where a polynomial is evaluated in another order, a tie may fall otherwise.
#pragma once
#include "noise.h"

namespace {

INLINE float clamped_reciprocal(float numerator, float x) {
    const float r = numerator / x;
    return r > 3.4028234663852886e38f ? 3.4028234663852886e38f : r;  // a NaN stays
}

// blockwise.bend(0) and BELOW_ONE.
constexpr double BEND = 0.38629436111989061883, BELOW_ONE = 1 - 0x1p-20;

// blockwise.truncate: what is added to the bits of an fp32 number before SHIFT of them are cut off, 0 ... 2^SHIFT - 1.
template <int SHIFT, bool BENT>
INLINE vu added(vu w) {
    if (!BENT) return w >> (32 - SHIFT);
    constexpr double one = 4294967296.0, scale = (1 << SHIFT) * BELOW_ONE;
    constexpr float c0 = static_cast<float>((1 + BEND) * scale / one),
                    c1 = static_cast<float>(-3 * BEND * scale / one / one),
                    c2 = static_cast<float>(2 * BEND * scale / one / one / one);
    const vf u = whole_number(w);
    return (vu)truncate(u * fma(u, fma(u, splat(c2), splat(c1)), splat(c0)));
}

// q in -L ... L stands for sign(q) (q / L)^2.
template <int L>
struct SquareCode {
    typedef int8_t Lane;
    static constexpr bool HAS_SIGN = true;
    INLINE float unit(float stored) { return stored / static_cast<float>(L * L); }
    INLINE float stored(float largest) { return largest; }
    INLINE float inverse(float largest) { return clamped_reciprocal(L * L, largest); }
    INLINE vf decode(vi q, float unit) {
        const vf x = to_float(q);
        return x * absolute(x) * unit;
    }
    // With v = 1 - u, q + 1 is chosen where y > q^2 + u (2 q + 1): where q + 1 <= sqrt(y - v + v^2) + v.
    // Where there is no root y is under v, and the NaN becomes zero.
    INLINE vi encode(vf x, float inverse, vu w) {
        const vf v = one_minus_uniform(w);
        const vf square = fma(v, v, fms(absolute(x), splat(inverse), v));
        return truncate(with_sign(at_most(root(square) + v, L), x));
    }
};

// q in 0 ... T: the leading bits of an fp32 number, M of them mantissa, T standing for the block's largest.
template <int T, int M>
struct FloatCode {
    typedef uint8_t Lane;
    static constexpr bool HAS_SIGN = false;
    static constexpr int SHIFT = 23 - M, OFFSET = (127 << M) - T;
    INLINE float unit(float stored) { return stored; }
    INLINE float stored(float largest) { return largest; }
    INLINE float inverse(float largest) { return clamped_reciprocal(1.0f, largest); }
    INLINE vf decode(vi q, float unit) {
        const vu value = (vu)((q + OFFSET) << SHIFT);
        return where_positive(q, number(value) * unit);
    }
    INLINE vi encode(vf x, float inverse, vu w) {
        const vf y = at_most(x * inverse, 1.0f);
        const vi q = (vi)((bits(y) + added<SHIFT, M == 0>(w)) >> SHIFT) - OFFSET;
        return larger(q, smaller((vi)bits(x), vi{} + 1));  // 0 for 0 alone
    }
};

// float8_e4m3fn; SIGNED moments may be stored as zero, others only where they are zero.
template <bool SIGNED>
struct E4M3 {
    typedef uint8_t Lane;
    static constexpr bool HAS_SIGN = SIGNED;
    INLINE float unit(float stored) { return stored; }
    INLINE float stored(float largest) { return largest / 448.0f; }
    INLINE float inverse(float largest) { return clamped_reciprocal(448.0f, largest); }
    INLINE vf decode(vi q, float unit) {
        const vu body = (vu)q & 0x7Fu;
        const vf normal = number((body << 20) + (120u << 23));
        const vf small = to_float((vi)body) * 0x1p-9f;
        const vf x = (vi)body >= 8 ? normal : small;
        return (SIGNED ? number(bits(x) | (((vu)q & 0x80u) << 24)) : x) * unit;
    }
    INLINE vi encode(vf x, float inverse, vu w) {
        const vf y = at_most(absolute(x) * inverse, 448.0f);
        const vi normal = (vi)((bits(y) + added<20, false>(w)) >> 20) - (120 << 3);
        const vi small = truncate(fma(y, splat(512.0f), uniform(w)));
        vi q = y >= 0x1p-6f ? normal : small;
        if (!SIGNED) q = larger(q, vi{} + 1) & (y > 0.0f);
        return SIGNED ? q | (vi)((bits(x) >> 24) & 0x80u) : q;
    }
};

}  // namespace
