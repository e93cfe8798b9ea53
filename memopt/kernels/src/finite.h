// Whether numbers are all finite, at the speed at which they can be read.
#pragma once
#include "abi.h"
#include "vec.h"

namespace {

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
            const vector magnitude = load<vector>(x + k / UNROLL * part + k % UNROLL * N + i) & MASK;
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

}  // namespace
