// A moment that is kept of every eleventh element of a row in fp32 (memopt/formats/sliced.py); the others are zero.
#pragma once
#include "state/moments.h"

namespace {

constexpr int EVERY = 11;

class Sliced : public Plain {
    float* const value;
    uint8_t* const mask;
    float* const kept;
    const int64_t offset, cols;
    const int n;

    // Calls each(place in the chunk, place in what is kept). Rows have `whole_cols` elements, whatever the chunk's are.
    template <class Each>
    INLINE_METHOD void all(const Each& each) const {
        const int64_t per_row = (cols + EVERY - 1) / EVERY;
        int64_t row = offset / cols, begin = row * cols - offset;  // of the row, from the chunk's first element
        for (; begin < n; row++, begin += cols) {
            int64_t k = begin < 0 ? (-begin + EVERY - 1) / EVERY : 0;
            const int64_t stop = begin + cols < n ? begin + cols : n;
            for (int64_t i = begin + k * EVERY; i < stop; i += EVERY, k++) each(i, row * per_row + k);
        }
    }

  public:
    INLINE_METHOD Sliced(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums&)
        : value(scratch.value), mask(scratch.code), kept(static_cast<float*>(t.data[slot])), offset(place.offset),
          cols(t.whole_cols), n(place.n) {
        std::memset(value, 0, sizeof scratch.value);
        std::memset(mask, 0, sizeof scratch.code);
        all([&](int64_t i, int64_t k) __attribute__((always_inline)) { value[i] = kept[k], mask[i] = 1; });
    }
    INLINE_METHOD vf get(int i) const { return loadf(value + i); }
    INLINE_METHOD vf only_kept(int i, vf x) const { return widen(mask + i) != 0 ? x : vf{}; }
    INLINE_METHOD void put(int i, vf x) { store(value + i, x); }
    INLINE_METHOD void close() {
        all([&](int64_t i, int64_t k) __attribute__((always_inline)) { kept[k] = value[i]; });
    }
};

}  // namespace
