// The element codes of memopt/formats/blockwise.py and fp8.py, one struct each:
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

// Of blockwise.py.
constexpr double BELOW_ONE = 1 - 0x1p-20, BELOW_ONE_OF_CODES = 1 - 0x1p-16;

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
        return nearly_root(with_a_root(square), 1.0f, v);
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

// q in 0 ... T stands for SHARE ((q + C) / (N + C))^P, N being T - EVEN and P 4 or 8; the EVEN codes above N are even steps
// from half of the block's largest to all of it.
template <int T, int P, int C, int EVEN>
struct RootCode {
    typedef uint8_t Lane;
    static constexpr bool HAS_SIGN = false;
    static constexpr int N = T - EVEN;
    static constexpr double SHARE = EVEN ? 0.5 : 1.0, PER_ROOT = (N + C) * (EVEN ? 1.18920711500272106672 : 1.0);
    static_assert(P == 4 || (P == 8 && !EVEN), "SHARE^(-1/P) is of P = 4");
    static_assert(!(EVEN && C), "code 0 is 0 by its root");
    INLINE float unit(float stored) { return stored; }
    INLINE float stored(float largest) { return largest; }
    // Rounded down where its product with the largest would be above one, so that no product is.
    INLINE float inverse(float largest) {
        const float r = clamped_reciprocal(1.0f, largest);
        return r * largest > 1.0f ? r * 0x1.fffffep-1f : r;
    }
    INLINE vf decode(vi q, float unit) {
        constexpr double whole = N + C, fourth = whole * whole * whole * whole;
        const vf x = to_float(q + C), square = x * x, power = square * square;
        const vf value = P == 8 ? power * power * static_cast<float>(SHARE / (fourth * fourth)) * unit
                                : power * static_cast<float>(SHARE / fourth) * unit;
        if (EVEN) return x > 1.0f * N ? (x - 1.0f * (N - EVEN)) * (unit * (0.5f / EVEN)) : value;  // 0 is 0
        return where_positive(q, value);
    }
    // 0 for 0 alone.
    INLINE void encode(uint8_t* to, const float* value, float inverse, Dither& dither) {
#if LANES_512
        vi q[GROUP];
        for (int k = 0; k < GROUP; k++) q[k] = code(loadf(value + k * W), inverse, dither.next());
        const __m512i first = _mm512_packs_epi32((__m512i)q[0], (__m512i)q[1]);
        const __m512i second = _mm512_packs_epi32((__m512i)q[2], (__m512i)q[3]);
        store_packed(to, _mm512_packus_epi16(first, second));
#else
        for (int k = 0; k < GROUP; k++) narrow(to + k * W, code(loadf(value + k * W), inverse, dither.next()));
#endif
    }

  private:
    INLINE vi code(vf x, float inverse, vu w) {
        constexpr float beyond = static_cast<float>(BELOW_ONE_OF_CODES * 0x1p-32);
        const vf y = x * inverse;
        constexpr float scale = static_cast<float>(PER_ROOT);
        const vf offset = splat(-1.0f * C);
        vf place = P == 4 ? fourth_root(y, scale, offset) : nearly_root(fourth_root(y, 1.0f, vf{}), scale, offset);
        if (EVEN) place = y < 0.5f ? place : fma(y, splat(2.0f * EVEN), splat(1.0f * (N - EVEN)));
        const vi q = truncate(fma(whole_number(w), splat(beyond), place));
#if LANES_512
        const __mmask16 some = _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
        return (vi)_mm512_maskz_max_epi32(some, (__m512i)q, _mm512_set1_epi32(1));
#else
        return smaller(larger(q, smaller((vi)bits(x), vi{} + 1)), vi{} + T);
#endif
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
