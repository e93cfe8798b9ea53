// The element codes of memopt/formats/blockwise.py, int8.py, int4.py and fp8.py, one struct each:
//   unit(stored)      what a decoded code is multiplied by
//   stored(largest)   what is kept of the largest magnitude of a block
//   inverse(largest)  what a value is multiplied by before it is coded
//   decode            one vector
//   encode            GROUP vectors, written one behind the other: numbers that have become small are finished together
//                     where there are instructions for it
//   HAS_SIGN          whether values may be negative
// Formulas are those of the Python files; where a polynomial is evaluated in another order, a tie may fall otherwise.
#pragma once
#include "state/noise.h"

namespace {

constexpr int GROUP = W == 16 ? 4 : 2;

#if LANES_512
// Bytes of four vectors that were packed side by side in each 128 bits, one vector behind the other.
struct Order {
    alignas(64) uint32_t of[W];
};
constexpr Order behind_each_other() {
    Order order{};
    for (int i = 0; i < W; i++) order.of[i] = static_cast<uint32_t>(i % 4 * 4 + i / 4);
    return order;
}
constexpr Order BEHIND = behind_each_other();
INLINE void store_packed(uint8_t* to, __m512i q) {
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(_mm512_load_si512(BEHIND.of), q));
}
#endif

INLINE float clamped_reciprocal(float numerator, float x) {
    const float r = numerator / x;
    return r > 3.4028234663852886e38f ? 3.4028234663852886e38f : r;  // a NaN stays
}

constexpr double BELOW_ONE = 1 - 0x1p-20;

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
    // Where there is no root y is under v, and v alone is under one.
    INLINE vf magnitude(vf x, float inverse, vu w) {
        const vf v = one_minus_uniform(w);
        const vf square = fma(v, v, fms(absolute(x), splat(inverse), v));
        return root(not_negative(square)) + v;
    }
    INLINE void encode(uint8_t* to, const float* value, float inverse, Dither& dither) {
        vi q[GROUP];
        for (int k = 0; k < GROUP; k++) {
            const vf x = loadf(value + k * W), size = magnitude(x, inverse, dither.next());
            q[k] = truncate(with_sign(W == 16 ? size : at_most(size, L), x));
        }
#if LANES_512
        const __m512i first = _mm512_packs_epi32((__m512i)q[0], (__m512i)q[1]);
        const __m512i second = _mm512_packs_epi32((__m512i)q[2], (__m512i)q[3]);
        const __m512i all = _mm512_max_epi8(_mm512_packs_epi16(first, second), _mm512_set1_epi8(-L));
        store_packed(to, L < 127 ? _mm512_min_epi8(all, _mm512_set1_epi8(L)) : all);
#else
        for (int k = 0; k < GROUP; k++) narrow(to + k * W, q[k]);
#endif
    }
};

// Rounded down where its product with the largest would be above one, so that no product is.
INLINE float inverse_of_at_most_one(float largest) {
    const float r = clamped_reciprocal(1.0f, largest);
    return r * largest > 1.0f ? r * 0x1.fffffep-1f : r;
}

// int8.py: q in 0 ... 255, the leading bits of the logarithm that the bits of an fp32 number are, as an fp32 number.
struct TaperedCode {
    typedef uint8_t Lane;
    static constexpr bool HAS_SIGN = false;
    static constexpr int SHIFT = 23 - 6, TOP = 255;
    static constexpr int32_t FIRST = 9 << 20, SUM = (127 << 23) + FIRST;
    static constexpr int32_t PLACES = (150 << 23) + (1 << 20) + (TOP << SHIFT), LEAST = 0x37500000;
    INLINE float unit(float stored) { return stored; }
    INLINE float stored(float largest) { return largest; }
    INLINE float inverse(float largest) { return inverse_of_at_most_one(largest); }
    INLINE vf decode(vi q, float unit) {
        const vi z = truncate(number((vu)(PLACES - (q << SHIFT))));
        return where_positive(q, number((vu)(SUM - z)) * unit);
    }
    INLINE void encode(uint8_t* to, const float* value, float inverse, Dither& dither) {
#if LANES_512
        if (__builtin_expect(inverse > 0, 1)) {  // the largest is finite
            vu q[GROUP];
            for (int k = 0; k < GROUP; k++) {
                const vf y = loadf(value + k * W) * inverse;
                q[k] = ((dither.next() >> (32 - SHIFT)) - bits(to_float(SUM - (vi)bits(y)))) >> SHIFT;
            }
            return store_packed(to, _mm512_packus_epi16(finished(q[0], q[1]), finished(q[2], q[3])));
        }
#endif
        for (int k = 0; k < GROUP; k++) narrow(to + k * W, code(loadf(value + k * W), inverse, dither.next()));
    }

  private:
    INLINE vi code(vf x, float inverse, vu w) {
        const vf y = x * inverse;
        const vu z = bits(to_float(SUM - larger((vi)bits(y), vi{} + LEAST)));
        const vi q = (vi)((splat(static_cast<uint32_t>(PLACES)) - z + (w >> (32 - SHIFT))) >> SHIFT);
        return q & ~(y < 0x1p-125f);  // a NaN is not zero
    }
#if LANES_512
    // The same of all that is finite, where what is under code 1 is found after it was packed: OFFSET is where code 0 is
    // in 15 bits, and what is smaller than 2^-125 is 185 under it.
    INLINE __m512i finished(vu a, vu b) {
        constexpr int OFFSET = (1 << (32 - SHIFT)) - (PLACES >> SHIFT);
        const __m512i q = _mm512_packus_epi32((__m512i)a, (__m512i)b);
        const __mmask32 some = _mm512_cmpgt_epi16_mask(q, _mm512_set1_epi16(OFFSET - 185));
        return _mm512_maskz_max_epi16(some, _mm512_sub_epi16(q, _mm512_set1_epi16(OFFSET)), _mm512_set1_epi16(1));
    }
#endif
};

// int4.py: q in 0 ... 15, the exponent of an fp32 number, 15 standing for the block's largest.
struct PowersCode {
    typedef uint8_t Lane;
    static constexpr bool HAS_SIGN = false;
    static constexpr int SHIFT = 23, OFFSET = 127 - 15;
    INLINE float unit(float stored) { return stored; }
    INLINE float stored(float largest) { return largest; }
    INLINE float inverse(float largest) { return inverse_of_at_most_one(largest); }
    INLINE vf decode(vi q, float unit) {
        const vu value = (vu)((q + OFFSET) << SHIFT);
        return where_positive(q, number(value) * unit);
    }
    // 0 for 0 alone.
    INLINE void encode(uint8_t* to, const float* value, float inverse, Dither& dither) {
#if LANES_512
        vu q[GROUP];
        for (int k = 0; k < GROUP; k++) q[k] = moved(loadf(value + k * W), inverse, dither.next()) >> SHIFT;
        const __m512i offset = _mm512_set1_epi16(OFFSET);
        const __m512i first = _mm512_subs_epu16(_mm512_packus_epi32((__m512i)q[0], (__m512i)q[1]), offset);
        const __m512i second = _mm512_subs_epu16(_mm512_packus_epi32((__m512i)q[2], (__m512i)q[3]), offset);
        store_packed(to, _mm512_packus_epi16(first, second));
#else
        for (int k = 0; k < GROUP; k++) narrow(to + k * W, code(loadf(value + k * W), inverse, dither.next()));
#endif
    }

  private:
    // What is added to the bits before the mantissa is cut off, so that the fourth root keeps its mean.
    INLINE vu added(vu w) {
        constexpr double ROOT = 1.18920711500272106672 * (1 - 0x1p-22), SLOPE = ROOT - 1;
        constexpr float slope = static_cast<float>(-SLOPE * 0x1p-32), first = static_cast<float>(ROOT),
                        scale = static_cast<float>((1 << SHIFT) * BELOW_ONE);
        const vf h = fma(whole_number(w), splat(slope), splat(first)), square = h * h;
        return (vu)truncate(fma(square * square, splat(-scale), splat(2 * scale)));
    }
#if LANES_512
    // The bits of which the upper ones are the code, at least those of code 1; zeros for zero.
    INLINE vu moved(vf x, float inverse, vu w) {
        const vf least = number(splat(static_cast<uint32_t>(OFFSET + 1) << SHIFT));
        const __m512i y = (__m512i)_mm512_max_ps(least, x * inverse);
        return (vu)_mm512_maskz_add_epi32(_mm512_test_epi32_mask((__m512i)x, (__m512i)x), y, (__m512i)added(w));
    }
#else
    INLINE vi code(vf x, float inverse, vu w) {
        const vi q = (vi)((bits(x * inverse) + added(w)) >> SHIFT) - OFFSET;
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
    INLINE void encode(uint8_t* to, const float* value, float inverse, Dither& dither) {
        for (int k = 0; k < GROUP; k++) narrow(to + k * W, code(loadf(value + k * W), inverse, dither.next()));
    }

  private:
    INLINE vi code(vf x, float inverse, vu w) {
        const vf y = at_most(absolute(x) * inverse, 448.0f);
        if (!SIGNED) return larger(in_roots(y, uniform(w)), vi{} + 1) & (y > 0.0f);
        const vi normal = (vi)((bits(y) + (w >> 12)) >> 20) - (120 << 3);
        const vi small = truncate(fma(y, splat(512.0f), uniform(w)));
        return (y >= 0x1p-6f ? normal : small) | (vi)((bits(x) >> 24) & 0x80u);
    }
    // fp8.rounded_in_roots
    INLINE vi in_roots(vf y, vf u) {
        const vi octave = larger((vi)(bits(y) >> 23), vi{} + 121);
        const vf steps = y * number((vu)(257 - octave) << 23);
        const vf whole = number((vu)larger((vi)bits(steps), (vi)bits(splat(1.0f))));
        const vf bend = quotient((splat(1.0f) - u) * u * 0.375f, whole);
        return truncate(fma(u + bend, splat(static_cast<float>(BELOW_ONE)), steps)) + ((octave - 121) << 3);
    }
};

}  // namespace
