// Moments of which only means are kept, and the six formats.
#pragma once
#include "moments.h"

namespace {

// A moment kept as row and column means, x = row * col / mean. `put` adds to the sums from which the new means come.
class Factored : public Plain {
    const float* col;
    float row;
    Sums& sums;
    float* const column;
    vf across{};

  public:
    INLINE_METHOD Factored(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums& into)
        : sums(into), column(into.column + (place.col - into.first_col)) {
        row = static_cast<const float*>(t.data[slot])[place.row] / into.mean[slot];
        col = static_cast<const float*>(t.aux[slot]) + place.row / t.height * t.cols + place.col;
        if (!place.whole) {
            std::memcpy(scratch.value, col, 4 * place.n);
            for (int i = place.n; i % W; i++) scratch.value[i] = 0;
            col = scratch.value;
        }
    }
    INLINE_METHOD vf get(int i) const { return row * loadf(col + i); }
    INLINE_METHOD void put(int i, vf x) {
        across += x;
        store(column + i, loadf(column + i) + x);
    }
    INLINE_METHOD void close() { sums.row += sum_lanes(__builtin_convertvector(across, vd)); }
};

// The same moment, read as 1 / sqrt(x).
class FactoredRoot : public Plain {
    const float* root;
    float row;

  public:
    INLINE_METHOD FactoredRoot(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums& sums) {
        row = 1.0f / __builtin_sqrtf(static_cast<const float*>(t.data[slot])[place.row] / sums.mean[slot]);
        root = sums.root[slot] + (place.col - sums.first_col);
        if (!place.whole) {
            std::memcpy(scratch.value, root, 4 * place.n);
            for (int i = place.n; i % W; i++) scratch.value[i] = 0;
            root = scratch.value;
        }
    }
    INLINE_METHOD vf get(int i) const { return row * loadf(root + i); }
};

// One number for each run of `span` elements, which an earlier pass has written.
class RowMean : public Plain {
    const float* const value;

  public:
    INLINE_METHOD RowMean(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums&)
        : value(scratch.value) {
        const float* mean = static_cast<const float*>(t.data[slot]) + place.offset / t.span;
        int64_t stop = t.span - place.offset % t.span;  // from here on the next one's
        for (int i = 0; i < place.n; stop += t.span, mean++)
            for (const int end = stop < place.n ? stop : place.n; i < end; i++) scratch.value[i] = *mean;
        for (int i = place.n; i % W; i++) scratch.value[i] = 0;
    }
    INLINE_METHOD vf get(int i) const { return loadf(value + i); }
};

// The six formats: what holds the second moment and other non-negative ones (U), what holds the signed one (S), and
// what reads the inverse root of a U where a pass wants that.
struct In32 { typedef Full U, S, R; };
struct InHalf { typedef Half U, S, R; };
struct In8 {
    typedef Coded<FloatCode<255, 4>, Bytes, 256> U;
    typedef Coded<SquareCode<127>, Bytes, 256> S;
    typedef U R;
};
struct InFp8 {
    typedef Coded<E4M3<false>, Bytes, 256> U;
    typedef Coded<E4M3<true>, Bytes, 256> S;
    typedef U R;
};
struct In4 {
    typedef Coded<FloatCode<15, 0>, Nibbles, 128> U;
    typedef Coded<SquareCode<7>, Nibbles, 128> S;
    typedef U R;
};
struct InFactors { typedef Factored U; typedef Full S; typedef FactoredRoot R; };
template <class F> struct BesideRowMeans { typedef RowMean U, R; typedef typename F::S S; };

}  // namespace
