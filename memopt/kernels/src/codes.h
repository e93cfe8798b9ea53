// The element codes of memopt/formats/blockwise.py and fp8.py, one struct each:
//   unit(stored)      what a decoded code is multiplied by
//   stored(largest)   what is kept of the largest magnitude of a block
//   inverse(largest)  what a value is multiplied by before it is coded
//   decode            one vector
//   encode            two vectors, written one behind the other: what is left of a number in its lower or upper 16 bits
//                     is finished for both at once where there is an instruction for it
//   HAS_SIGN          whether values may be negative
// Formulas are those of the Python files; where a polynomial is evaluated in another order, a tie may fall otherwise.
#pragma once
#include "noise.h"

namespace {

INLINE float clamped_reciprocal(float numerator, float x) {
    const float r = numerator / x;
    return r > 3.4028234663852886e38f ? 3.4028234663852886e38f : r;  // a NaN stays
}

// Of blockwise.py.
constexpr double ROOT = 1.18920711500272106672 * (1 - 0x1p-22), SLOPE = ROOT - 1, BELOW_ONE = 1 - 0x1p-20;

// blockwise.truncate: what is added to the bits of an fp32 number before SHIFT of them are cut off, 0 ... 2^SHIFT - 1.
template <int SHIFT, bool IN_ROOTS>
INLINE vu added(vu w) {
    if (!IN_ROOTS) return w >> (32 - SHIFT);
    constexpr float slope = static_cast<float>(-SLOPE * 0x1p-32), first = static_cast<float>(ROOT),
                    scale = static_cast<float>((1 << SHIFT) * BELOW_ONE);
    const vf h = fma(whole_number(w), splat(slope), splat(first)), square = h * h;
    return (vu)truncate(fma(square * square, splat(-scale), splat(2 * scale)));
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
    INLINE vf magnitude(vf x, float inverse, vu w) {
        const vf v = one_minus_uniform(w);
        const vf square = fma(v, v, fms(absolute(x), splat(inverse), v));
        return root(square) + v;
    }
    INLINE void encode(uint8_t* to, vf x, vf y, float inverse, vu w, vu u) {
        const vf a = magnitude(x, inverse, w), b = magnitude(y, inverse, u);
#if LANES_512
        // What truncation makes of a NaN has no lower bits.
        const __m512i q = halves(LOWER, (vu)truncate(with_sign(a, x)), (vu)truncate(with_sign(b, y)));
        const __m512i most = _mm512_set1_epi16(L), least = _mm512_set1_epi16(-L);
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi16_epi8(_mm512_min_epi16(_mm512_max_epi16(q, least), most)));
#else
        narrow(to, truncate(with_sign(at_most(a, L), x)));
        narrow(to + W, truncate(with_sign(at_most(b, L), y)));
#endif
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
    // Rounded down where its product with the largest would be above one, so that no product is.
    INLINE float inverse(float largest) {
        const float r = clamped_reciprocal(1.0f, largest);
        return r * largest > 1.0f ? r * 0x1.fffffep-1f : r;
    }
    INLINE vf decode(vi q, float unit) {
        const vu value = (vu)((q + OFFSET) << SHIFT);
        return where_positive(q, number(value) * unit);
    }
    // 0 for 0 alone.
    INLINE void encode(uint8_t* to, vf x, vf y, float inverse, vu w, vu u) {
#if LANES_512
        const __m512i q = _mm512_srli_epi16(halves(UPPER, moved(x, inverse, w), moved(y, inverse, u)), SHIFT - 16);
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi16_epi8(_mm512_subs_epu16(q, _mm512_set1_epi16(OFFSET))));
#else
        narrow(to, code(x, inverse, w));
        narrow(to + W, code(y, inverse, u));
#endif
    }

  private:
#if LANES_512
    // The bits of which the upper ones are the code, at least those of code 1; zeros for zero.
    INLINE vu moved(vf x, float inverse, vu w) {
        const vf least = number(splat(static_cast<uint32_t>(OFFSET + 1) << SHIFT));
        const __m512i y = (__m512i)_mm512_max_ps(least, x * inverse);
        return (vu)_mm512_maskz_add_epi32(_mm512_test_epi32_mask((__m512i)x, (__m512i)x), y,
                                          (__m512i)added<SHIFT, M == 0>(w));
    }
#else
    INLINE vi code(vf x, float inverse, vu w) {
        const vi q = (vi)((bits(x * inverse) + added<SHIFT, M == 0>(w)) >> SHIFT) - OFFSET;
        return larger(q, smaller((vi)bits(x), vi{} + 1));
    }
#endif
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
    INLINE void encode(uint8_t* to, vf x, vf y, float inverse, vu w, vu u) {
        narrow(to, code(x, inverse, w));
        narrow(to + W, code(y, inverse, u));
    }

  private:
    INLINE vi code(vf x, float inverse, vu w) {
        const vf y = at_most(absolute(x) * inverse, 448.0f);
        const vi normal = (vi)((bits(y) + added<20, false>(w)) >> 20) - (120 << 3);
        const vi small = truncate(fma(y, splat(512.0f), uniform(w)));
        vi q = y >= 0x1p-6f ? normal : small;
        if (!SIGNED) q = larger(q, vi{} + 1) & (y > 0.0f);
        return SIGNED ? q | (vi)((bits(x) >> 24) & 0x80u) : q;
    }
};

}  // namespace
