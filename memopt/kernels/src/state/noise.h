// The dither of memopt/core/dither.py.
#pragma once
#include "vec.h"

namespace {

constexpr uint32_t MIX1 = 0x85EBCA6Bu, MIX2 = 0xC2B2AE35u, ALONG = 0x6A09E667u;

INLINE uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * MIX1;
    x = (x ^ (x >> 13)) * MIX2;
    return x ^ (x >> 16);
}

// The words of one row of one moment at one step: of columns col ... col + W - 1, then of the next W, and so on.
struct Dither {
    vu now;

    // key: of the moment; turn: what the step adds
    INLINE_METHOD Dither(uint32_t key, uint32_t turn, int64_t row, int64_t col)
        : now(iota() * ALONG + (mix(key ^ static_cast<uint32_t>(row)) + turn + static_cast<uint32_t>(col) * ALONG)) {}
    INLINE_METHOD vu next() {
        const vu w = now;
        now = now + W * ALONG;
        return w;
    }
};

// The uniform number in [0, 1] of a word. Where there is a conversion of unsigned words it has 8 bits more than the
// plain path's, which are rounded off.
INLINE vf whole_number(vu w) {
#if LANES_512
    return _mm512_cvtepu32_ps((__m512i)w);
#else
    return to_float((vi)(w >> 8)) * 256.0f;
#endif
}
INLINE vf uniform(vu w) { return whole_number(w) * 0x1p-32f; }
INLINE vf one_minus_uniform(vu w) { return fma(whole_number(w), splat(-0x1p-32f), splat(1.0f)); }

}  // namespace
