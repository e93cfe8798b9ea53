// Parameters and gradients of 16 bits, rounded to nearest even as torch rounds them.
#pragma once
#include "abi.h"
#include "vec.h"

namespace {

INLINE vf load_bf16(const uint16_t* from) { return number(widen(from) << 16); }

INLINE void store_bf16(uint16_t* to, vf x) {
    const vu b = bits(x);
    const vu rounded = (b + (0x7FFFu + ((b >> 16) & 1u))) >> 16;
    narrow(to, x == x ? rounded : splat(0x7FC0u));
}

#if LANES_512
INLINE vf load_f16(const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
INLINE void store_f16(uint16_t* to, vf x) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif LANES_256
INLINE vf load_f16(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
INLINE void store_f16(uint16_t* to, vf x) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
INLINE vf load_f16(const uint16_t* from) {
    const vu h = widen(from), sign = (h & 0x8000u) << 16, body = h & 0x7FFFu;
    const vf normal = number((body << 13) + (112u << 23));
    const vf subnormal = to_float((vi)body) * 0x1p-24f;
    const vf special = number((body << 13) | 0x7F800000u);
    const vf x = (vi)body >= 0x7C00 ? special : (vi)body >= 0x0400 ? normal : subnormal;
    return number(bits(x) | sign);
}
INLINE void store_f16(uint16_t* to, vf x) {
    const vu b = bits(x), sign = (b >> 16) & 0x8000u, a = b & 0x7FFFFFFFu;
    const vu normal = (a - (112u << 23) + (0xFFFu + ((a >> 13) & 1u))) >> 13;
    // Adding 0.5 leaves the half's subnormal in the last bits, rounded to nearest even by the addition itself.
    const vu subnormal = bits(number(a) + 0.5f) - 0x3F000000u;
    const vu nan = splat(0x7E00u), inf = splat(0x7C00u);
    const vi m = (vi)a;
    const vu h = m > 0x7F800000 ? nan : m >= 0x477FF000 ? inf : m >= (113 << 23) ? normal : subnormal;
    narrow(to, h | sign);
}
#endif

INLINE int size_of(uint8_t dtype) { return dtype == memopt::F32 ? 4 : 2; }

INLINE void* element(void* first, int64_t offset, uint8_t dtype) {
    return static_cast<char*>(first) + offset * size_of(dtype);
}

// n numbers, from where they lie or widened into `buffer`; zeros up to a whole vector.
INLINE const float* load_numbers(const void* from, int n, uint8_t dtype, float* buffer) {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    if (dtype == memopt::F32) {
        const float* direct = static_cast<const float*>(from);
        if (n % W == 0) return direct;
        std::memcpy(buffer, direct, 4 * n);
        for (int i = n; i % W; i++) buffer[i] = 0;
        return buffer;
    }
    uint16_t tail[W] = {};
    const int whole = n - n % W;
    if (n > whole) std::memcpy(tail, half + whole, 2 * (n - whole));
    for (int i = 0; i < n; i += W) {
        const uint16_t* at = i < whole ? half + i : tail;
        store(buffer + i, dtype == memopt::BF16 ? load_bf16(at) : load_f16(at));
    }
    return buffer;
}

INLINE void store_numbers(void* to, int n, uint8_t dtype, const float* buffer) {
    if (dtype == memopt::F32) {
        float* direct = static_cast<float*>(to);
        if (direct != buffer) std::memcpy(direct, buffer, 4 * n);
        return;
    }
    uint16_t* half = static_cast<uint16_t*>(to);
    uint16_t tail[W];
    const int whole = n - n % W;
    for (int i = 0; i < n; i += W) {
        uint16_t* at = i < whole ? half + i : tail;
        dtype == memopt::BF16 ? store_bf16(at, loadf(buffer + i)) : store_f16(at, loadf(buffer + i));
    }
    if (n > whole) std::memcpy(half + whole, tail, 2 * (n - whole));
}

}  // namespace
