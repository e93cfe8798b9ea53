// The element codes of memopt/formats/blockwise.py and fp8.py, one struct each:
//   unit(stored)      what a decoded code is multiplied by
//   stored(largest)   what is kept of the largest magnitude of a block
//   inverse(largest)  what a value is multiplied by before it is coded
//   decode, encode    one vector
// Formulas are those of the Python files; where a polynomial is evaluated in another order, a tie may fall otherwise.
#pragma once
#include "noise.h"

namespace {

INLINE float clamped_reciprocal(float numerator, float x) {
    const float r = numerator / x;
    return r > 3.4028234663852886e38f ? 3.4028234663852886e38f : r;  // a NaN stays
}

// k of blockwise.correction(M), with its order of additions.
constexpr double correction(int mantissa) {
    const int n = 1 << mantissa;
    double sum = 0;
    for (int i = n + 1; i <= 2 * n; i++) sum += 1.0 / i;
    return 1 - sum / 0.6931471805599453;
}

// blockwise.truncate: fp32 bits shifted right, the next code chosen where u < h(f) = f (1 - k + f (3 k - 2 k f)).
// F = f 2^SHIFT is a whole number, and both sides are taken times 2^24.
template <int SHIFT, bool CORRECTED, int M>
INLINE vi rounded_shift(vf y, vu w) {
    constexpr double k = CORRECTED ? correction(M) : 0.0, one = 1 << SHIFT, scale = 1 << 24;
    constexpr float c0 = static_cast<float>((1 - k) * scale / one), c1 = static_cast<float>(3 * k * scale / one / one),
                    c2 = static_cast<float>(-2 * k * scale / one / one / one);
    const vu b = bits(y);
    const vf F = to_float((vi)(b & ((1u << SHIFT) - 1)));
    const vf h = CORRECTED ? F * fma(F, fma(F, splat(c2), splat(c1)), splat(c0)) : F * c0;
    return increment_where_less((vi)(b >> SHIFT), upper24(w), h);
}

// q in -L ... L stands for sign(q) (q / L)^2.
template <int L>
struct SquareCode {
    typedef int8_t Lane;
    INLINE float unit(float stored) { return stored / static_cast<float>(L * L); }
    INLINE float stored(float largest) { return largest; }
    INLINE float inverse(float largest) { return clamped_reciprocal(L * L, largest); }
    INLINE vf decode(vi q, float unit) {
        const vf x = to_float(q);
        return x * absolute(x) * unit;
    }
    INLINE vi encode(vf x, float inverse, vu w) {
        const vf y = absolute(x) * inverse;
        const vi q = truncate(root(y));
        const vf f = to_float(q);
        // Exact, fused or not: (2 f + 1) 2^-24 and f f are whole numbers of few bits times a power of two.
        const vf width = fma(f, splat(0x1p-23f), splat(0x1p-24f));
        const vi rounded = increment_where_less(q, upper24(w) * width, fma(-f, f, y));
        return negate_where(smaller(rounded, vi{} + L), x);
    }
};

// q in 0 ... T: the leading bits of an fp32 number, M of them mantissa, T standing for the block's largest.
template <int T, int M>
struct FloatCode {
    typedef uint8_t Lane;
    static constexpr int SHIFT = 23 - M, OFFSET = (127 << M) - T;
    INLINE float unit(float stored) { return stored; }
    INLINE float stored(float largest) { return largest; }
    INLINE float inverse(float largest) { return clamped_reciprocal(1.0f, largest); }
    INLINE vf decode(vi q, float unit) {
        const vu value = (vu)((q + OFFSET) << SHIFT);
        return number(q > 0 ? value : vu{}) * unit;
    }
    INLINE vi encode(vf x, float inverse, vu w) {
        const vf y = at_most(x * inverse, 1.0f);
        const vi q = rounded_shift<SHIFT, true, M>(y, w) - OFFSET;
        return larger(q, vi{} + 1) & (x > 0.0f);
    }
};

// float8_e4m3fn; SIGNED moments may be stored as zero, others only where they are zero.
template <bool SIGNED>
struct E4M3 {
    typedef uint8_t Lane;
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
        const vi normal = rounded_shift<20, !SIGNED, 3>(y, w) - (120 << 3);
        const vi small = truncate(fma(upper24(w), splat(0x1p-24f), y * 512.0f));
        vi q = y >= 0x1p-6f ? normal : small;
        if (!SIGNED) q = larger(q, vi{} + 1) & (y > 0.0f);
        return SIGNED ? q | (vi)((bits(x) >> 24) & 0x80u) : q;
    }
};

}  // namespace
