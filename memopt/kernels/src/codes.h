// The element codes of memopt/formats/blockwise.py and fp8.py, one struct each:
//   unit(stored)      what a decoded code is multiplied by
//   stored(largest)   what is kept of the largest magnitude of a block
//   inverse(largest)  what a value is multiplied by before it is coded
//   decode, encode    one vector
// Formulas and the order of operations are those of the Python files, so that codes are the same bits.
#pragma once
#include "noise.h"

namespace {

INLINE float clamped_reciprocal(float numerator, float x) {
    const float r = numerator / x;
    return r > 3.4028234663852886e38f ? 3.4028234663852886e38f : r;  // a NaN stays
}

// k of blockwise.correction(M), with its order of additions.
constexpr float correction(int mantissa) {
    const int n = 1 << mantissa;
    double sum = 0;
    for (int i = n + 1; i <= 2 * n; i++) sum += 1.0 / i;
    return static_cast<float>(1 - sum / 0.6931471805599453);
}

// blockwise.truncate: fp32 bits shifted right, the next code chosen where u < h(f).
template <int SHIFT>
INLINE vi rounded_shift(vf y, float k, vu w) {
    const vu b = bits(y);
    const vf f = to_float((vi)(b & ((1u << SHIFT) - 1))) * (1.0f / (1 << SHIFT));
    const vf h = f - f * (1.0f - f) * (1.0f - 2.0f * f) * k;
    return ((vi)b >> SHIFT) - (vi)(upper24(w) * 0x1p-24f < h);
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
        const vi up = upper24(w) * (f * 0x1p-23f + 0x1p-24f) < y - f * f;  // all ones, which is -1
        const vi sign = (vi)bits(x) >> 31;
        return (smaller(q - up, vi{} + L) ^ sign) - sign;
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
        vf y = x * inverse;
        y = y > 1.0f ? splat(1.0f) : y;
        constexpr float k = correction(M);
        const vi q = rounded_shift<SHIFT>(y, k, w) - OFFSET;
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
        const vu body = (vu)q & 0x7Fu, sign = ((vu)q & 0x80u) << 24;
        const vf normal = number((body << 20) + (120u << 23));
        const vf small = to_float((vi)body) * 0x1p-9f;
        return number(bits((vi)body >= 8 ? normal : small) | sign) * unit;
    }
    INLINE vi encode(vf x, float inverse, vu w) {
        vf y = absolute(x) * inverse;
        y = y > 448.0f ? splat(448.0f) : y;
        constexpr float k = SIGNED ? 0.0f : correction(3);
        const vi normal = rounded_shift<20>(y, k, w) - (120 << 3);
        const vi small = truncate(y * 512.0f + upper24(w) * 0x1p-24f);
        vi q = y >= 0x1p-6f ? normal : small;
        if (!SIGNED) q = larger(q, vi{} + 1) & (y > 0.0f);
        return q | (vi)((bits(x) >> 24) & 0x80u);
    }
};

}  // namespace
