// The random words of memopt/noise.py.
#pragma once
#include "vec.h"

namespace {

constexpr uint32_t MIX1 = 0x85EBCA6Bu, MIX2 = 0xC2B2AE35u;

template <class U>
INLINE U mix(U x) {
    x = (x ^ (x >> 16)) * MIX1;
    x = (x ^ (x >> 13)) * MIX2;
    return x ^ (x >> 16);
}

// The dither of one row of one moment at one step.
struct Dither {
    uint32_t row;   // mix(key ^ row)
    uint32_t turn;  // step * 2^32 / golden ratio

    INLINE_METHOD Dither(uint32_t key, uint32_t step_turn, int64_t row_number)
        : row(mix(key ^ static_cast<uint32_t>(row_number))), turn(step_turn) {}
    // Words of columns col, col + 1, ...
    INLINE_METHOD vu words(int64_t col) const {
        return mix<vu>(iota() + (row + static_cast<uint32_t>(col))) + turn;
    }
};

// 24 upper bits as a number; the uniform number in [0, 1) is this times 2^-24.
INLINE vf upper24(vu w) { return to_float((vi)(w >> 8)); }

}  // namespace
