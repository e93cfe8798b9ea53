// Whether numbers are all finite, and the sum of their squares, at the speed at which they can be read.
#pragma once
#include "state/halves.h"

namespace {

// Bytes that are asked for ahead: on pages of 4 KiB the hardware begins anew at each of them, and reads a quarter less.
constexpr int FAR = 4096;

// Magnitudes are in order as integers, and Inf and NaN are the largest. Four places are read at once: the hardware
// fetches ahead for each of them.
template <class Int, Int MASK, Int INF>
bool finite_integers(const Int* x, int64_t n) {
    typedef Int vector __attribute__((vector_size(4 * W)));
    constexpr int N = sizeof(vector) / sizeof(Int), PLACES = 4, UNROLL = 2;
    vector bad[PLACES * UNROLL] = {};
    const int64_t part = n / (PLACES * UNROLL * N) * UNROLL * N;
    for (int64_t i = 0; i < part; i += UNROLL * N)
        for (int k = 0; k < PLACES * UNROLL; k++) {
            const Int* const from = x + k / UNROLL * part + k % UNROLL * N + i;
            fetch(from + FAR / sizeof(Int));
            const vector magnitude = load<vector>(from) & MASK;
            bad[k] = bad[k] > magnitude ? bad[k] : magnitude;
        }
    for (int k = 0; k < PLACES * UNROLL; k++)
        for (int lane = 0; lane < N; lane++)
            if (bad[k][lane] >= INF) return false;
    for (int64_t i = PLACES * part; i < n; i++)
        if ((x[i] & MASK) >= INF) return false;
    return true;
}

bool all_finite(const void* data, int64_t n, uint8_t dtype) {
    if (dtype == memopt::F32) return finite_integers<int32_t, 0x7FFFFFFF, 0x7F800000>(static_cast<const int32_t*>(data), n);
    const int16_t* x = static_cast<const int16_t*>(data);
    if (dtype == memopt::BF16) return finite_integers<int16_t, 0x7FFF, 0x7F80>(x, n);
    return finite_integers<int16_t, 0x7FFF, 0x7C00>(x, n);
}

// Squares of fp32 numbers fit into fp64, and so do sums of them: the sum is finite where all of them are. It is taken in
// an order of its own, whatever is done with the piece afterwards.
template <class Load>
double sum_of_squares(const Load& at, const void* data, int size, int64_t n) {
    constexpr int PLACES = 4;
    vd sums[PLACES] = {};
    const int64_t part = n / (PLACES * W) * W;
    const auto add = [&](vd& sum, vf x) __attribute__((always_inline)) {
        const vd wide = __builtin_convertvector(x, vd);
        sum += wide * wide;
    };
    for (int64_t i = 0; i < part; i += W)
        for (int k = 0; k < PLACES; k++) {
            fetch(static_cast<const char*>(data) + (k * part + i) * size + FAR);
            add(sums[k], at(k * part + i, W));
        }
    for (int64_t i = PLACES * part; i < n; i += W) add(sums[0], at(i, static_cast<int>(n - i < W ? n - i : W)));
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

double squares(const void* data, int64_t n, uint8_t dtype) {
    const float* full = static_cast<const float*>(data);
    const uint16_t* half = static_cast<const uint16_t*>(data);
    if (dtype == memopt::F32)
        return sum_of_squares([&](int64_t i, int count) __attribute__((always_inline)) {
            if (__builtin_expect(count == W, 1)) return loadf(full + i);
            float tail[W] = {};
            std::memcpy(tail, full + i, 4 * count);
            return loadf(tail);
        }, data, 4, n);
    return sum_of_squares([&](int64_t i, int count) __attribute__((always_inline)) {
        uint16_t tail[W] = {};
        if (__builtin_expect(count != W, 0)) std::memcpy(tail, half + i, 2 * count);
        const uint16_t* from = count == W ? half + i : tail;
        return dtype == memopt::BF16 ? load_bf16(from) : load_f16(from);
    }, data, 2, n);
}

}  // namespace
