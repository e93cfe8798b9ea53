// Vectors of W lanes by the compiler's vector extensions: operators are the language's, only what has no operator is
// written per instruction set. The arithmetic is the same everywhere except that a machine without fused
// multiply-add rounds twice.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE_METHOD inline __attribute__((always_inline))
#define INLINE static INLINE_METHOD

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LANES_512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES_256 1
#endif

namespace {

#if LANES_512
constexpr int W = 16;
#elif LANES_256
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef double vd __attribute__((vector_size(8 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

template <class V, class T>
INLINE V load(const T* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}
template <class V, class T>
INLINE void store(T* to, V v) { __builtin_memcpy(to, &v, sizeof v); }

// Asks the memory for a line; the second for the cache of the core, where what is needed much later is out of the way.
INLINE void fetch(const void* from) {
    if (W > 4) __builtin_prefetch(from, 0, 3);  // vectors of four (SSE2) do not wait for memory
}
INLINE void fetch_early(const void* from) {
    if (W > 4) __builtin_prefetch(from, 0, 2);
}

INLINE vf loadf(const float* from) { return load<vf>(from); }
INLINE vf splat(float x) { return x - vf{}; }
INLINE vu splat(uint32_t x) { return x + vu{}; }
INLINE vu bits(vf x) { return (vu)x; }
INLINE vf number(vu x) { return (vf)x; }
INLINE vf absolute(vf x) { return number(bits(x) & 0x7FFFFFFFu); }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vi truncate(vf x) { return __builtin_convertvector(x, vi); }

INLINE vu iota() {
    alignas(4 * W) uint32_t lanes[W];
    for (int i = 0; i < W; i++) lanes[i] = i;
    return load<vu>(lanes);
}

INLINE vf fma(vf a, vf b, vf c) {
#if LANES_512
    return _mm512_fmadd_ps(a, b, c);
#elif LANES_256
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vf fms(vf a, vf b, vf c) {
#if LANES_512
    return _mm512_fmsub_ps(a, b, c);
#elif LANES_256
    return _mm256_fmsub_ps(a, b, c);
#else
    return fma(a, b, -c);
#endif
}

INLINE vf root(vf x) {
#if LANES_512
    return _mm512_sqrt_ps(x);
#elif LANES_256
    return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
    return _mm_sqrt_ps(x);
#elif defined(__aarch64__)
    return (vf)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// a / b within a unit in the last place, where 1 / b is finite; Inf is taken for the largest number. A division keeps the
// divider busy, and steps that code wait for it.
INLINE vf quotient(vf a, vf b) {
#if LANES_512
    b = _mm512_min_ps(_mm512_set1_ps(3.4028234663852886e38f), b);  // a NaN stays
    const vf nearly = _mm512_rcp14_ps(b), q = a * nearly;
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(q, b, a), nearly, q);
#else
    return a / b;
#endif
}

INLINE vi larger(vi a, vi b) {
#if LANES_512
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif LANES_256
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return a > b ? a : b;
#endif
}
INLINE vu larger(vu a, vu b) {
#if LANES_512
    return (vu)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif LANES_256
    return (vu)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
    return a > b ? a : b;
#endif
}
INLINE vi smaller(vi a, vi b) {
#if LANES_256
    return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
    return a < b ? a : b;
#endif
}

// A NaN stays a NaN.
INLINE vf at_most(vf x, float most) {
#if LANES_512
    return _mm512_min_ps(_mm512_set1_ps(most), x);
#elif LANES_256
    return _mm256_min_ps(_mm256_set1_ps(most), x);
#else
    return x > most ? splat(most) : x;
#endif
}
// x, or 0 where it is negative or NaN.
INLINE vf not_negative(vf x) {
#if LANES_512
    return _mm512_max_ps(x, vf{});
#elif LANES_256
    return _mm256_max_ps(x, vf{});
#else
    return x > 0.0f ? x : vf{};
#endif
}
INLINE vf where_positive(vi q, vf x) {
#if LANES_512
    return _mm512_maskz_mov_ps(_mm512_test_epi32_mask((__m512i)q, (__m512i)q), x);
#else
    return number(bits(x) & (vu)(q > 0));
#endif
}
// The magnitude of x with the sign of y, where x is not negative.
INLINE vf with_sign(vf x, vf y) { return number(bits(x) | (bits(y) & 0x80000000u)); }

INLINE uint32_t largest_lane(vu x) {
#if LANES_512
    return _mm512_reduce_max_epu32((__m512i)x);
#else
    uint32_t best = x[0];
    for (int i = 1; i < W; i++) best = x[i] > best ? x[i] : best;
    return best;
#endif
}

INLINE double sum_lanes(vd x) {
    double sum = 0;
    for (int i = 0; i < W; i++) sum += x[i];
    return sum;
}

// Lanes of 8 and 16 bits, widened and narrowed. Narrowing keeps the low bits.
INLINE vi widen(const int8_t* from) {
#if LANES_512
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif LANES_256
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    vi x{};
    for (int i = 0; i < W; i++) x[i] = from[i];
    return x;
#endif
}
INLINE vi widen(const uint8_t* from) {
#if LANES_512
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif LANES_256
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    vi x{};
    for (int i = 0; i < W; i++) x[i] = from[i];
    return x;
#endif
}
INLINE vu widen(const uint16_t* from) {
#if LANES_512
    return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif LANES_256
    return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    vu x{};
    for (int i = 0; i < W; i++) x[i] = from[i];
    return x;
#endif
}
INLINE void narrow(uint8_t* to, vi x) {
#if LANES_512
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x));
#elif LANES_256
    const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i y = _mm256_shuffle_epi8((__m256i)x, first);
    _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
#else
    for (int i = 0; i < W; i++) to[i] = static_cast<uint8_t>(x[i]);
#endif
}
INLINE void narrow(uint16_t* to, vu x) {
#if LANES_512
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)x));
#elif LANES_256
    const __m256i first = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,
                                           0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i y = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)x, first), 0x08);
    _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(y));
#else
    for (int i = 0; i < W; i++) to[i] = static_cast<uint16_t>(x[i]);
#endif
}

}  // namespace
