// Moments of which only means are kept, moments in any format, and the formats of a tensor.
#pragma once
#include "state/moments.h"

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

// Of the same moment 1 / sqrt(row mean) alone; `put` adds to the sums of the columns.
class RowRoot : public Plain {
    const vf root;
    float* const column;

  public:
    INLINE_METHOD RowRoot(const memopt::Tensor& t, int slot, const Place& place, Scratch&, Sums& into)
        : root(splat(1.0f / __builtin_sqrtf(static_cast<const float*>(t.data[slot])[place.row]))),
          column(into.column + (place.col - into.first_col)) {}
    INLINE_METHOD vf get(int) const { return root; }
    INLINE_METHOD void put(int i, vf x) { store(column + i, loadf(column + i) + x); }
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

// What keeps a moment, and nothing in between: for moments that are decoded into fp32 before a chunk is stepped and
// encoded after it, because each is kept in another format.
template <class Kept>
__attribute__((noinline)) void unpack(const memopt::Tensor& t, int slot, const Place& at, float* to, Sums& sums) {
    Scratch scratch;
    Kept kept(t, slot, at, scratch, sums);
    for (int b = 0; b * Kept::BLOCK < at.n; b++) {
        kept.begin(b);
        const int stop = (b + 1) * Kept::BLOCK < at.n ? (b + 1) * Kept::BLOCK : at.n;
        for (int i = b * Kept::BLOCK; i < stop; i += W) store(to + i, kept.get(i));
    }
}

template <class Kept>
__attribute__((noinline)) void pack(const memopt::Tensor& t, int slot, const Place& at, const float* from, Sums& sums) {
    Scratch scratch;
    Kept kept(t, slot, at, scratch, sums);
    for (int b = 0; b * Kept::BLOCK < at.n; b++) {
        const int stop = (b + 1) * Kept::BLOCK < at.n ? (b + 1) * Kept::BLOCK : at.n;
        kept.begin(b);
        for (int i = b * Kept::BLOCK; i < stop; i += W) kept.put(i, loadf(from + i));
        kept.end(b);
        kept.turn(b);
        for (int i = b * Kept::BLOCK; i < stop; i += GROUP * W) kept.code(i);
    }
    kept.close();
}

// A factored moment, or its inverse root, of elements that may be of several lines of several matrices: those of a
// stack, whose rows in the view of memopt/core/rows.py are many lines long.
template <bool ROOT>
__attribute__((noinline)) void spread(const memopt::Tensor& t, int slot, const Place& at, float* to, const Sums& sums) {
    const float* const rows = static_cast<const float*>(t.data[slot]);
    int64_t line = at.offset / t.span, c = at.offset % t.span;
    for (int i = 0; i < at.n; line++, c = 0) {
        const int64_t left = t.span - c, matrix = line / t.height;
        const int m = left < at.n - i ? static_cast<int>(left) : at.n - i;
        const float row = rows[line] / (sums.means[slot] ? sums.means[slot][matrix] : sums.mean[slot]);
        const float* col = static_cast<const float*>(t.aux[slot]) + matrix * t.span + c;
        const float factor = ROOT ? 1.0f / __builtin_sqrtf(row) : row;
        if (ROOT && sums.root[slot]) {
            const float* root = sums.root[slot] + (c - sums.first_col);
            for (int j = 0; j < m; j++) to[i + j] = factor * root[j];
        } else {
            for (int j = 0; j < m; j++) to[i + j] = factor * (ROOT ? 1.0f / __builtin_sqrtf(col[j]) : col[j]);
        }
        i += m;
    }
    for (int i = at.n; i % W; i++) to[i] = 0;
}

typedef Coded<TaperedCode, Bytes, 256> Unsigned8;
typedef Coded<SquareCode<127>, Bytes, 256> Signed8;
typedef Coded<E4M3<false>, Bytes, 256> UnsignedFp8;
typedef Coded<E4M3<true>, Bytes, 256> SignedFp8;
typedef Coded<PowersCode, Nibbles, 128> Unsigned4;
typedef Coded<SquareCode<7>, Nibbles, 128> Signed4;

// A moment in whatever format the tensor says.
template <bool SIGNED, bool ROOT>
class Staged : public Plain {
    const memopt::Tensor& t;
    const Place& place;
    Sums& sums;
    float* const value;
    const int slot;

  public:
    INLINE_METHOD Staged(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums& sums)
        : t(t), place(place), sums(sums), value(scratch.value), slot(slot) {
        open();
    }
    INLINE_METHOD void open() const {
        switch (t.formats[slot]) {
            case memopt::FMT_32BIT: return unpack<Full>(t, slot, place, value, sums);
            case memopt::FMT_BF16: return unpack<Half>(t, slot, place, value, sums);
            case memopt::FMT_8BIT: return unpack<Kind<Signed8, Unsigned8>>(t, slot, place, value, sums);
            case memopt::FMT_FP8: return unpack<Kind<SignedFp8, UnsignedFp8>>(t, slot, place, value, sums);
            case memopt::FMT_4BIT: return unpack<Kind<Signed4, Unsigned4>>(t, slot, place, value, sums);
            default: return spread<ROOT>(t, slot, place, value, sums);
        }
    }
    INLINE_METHOD vf get(int i) const { return loadf(value + i); }
    INLINE_METHOD void put(int i, vf x) { store(value + i, x); }
    INLINE_METHOD void close() {
        switch (t.formats[slot]) {
            case memopt::FMT_32BIT: return pack<Full>(t, slot, place, value, sums);
            case memopt::FMT_BF16: return pack<Half>(t, slot, place, value, sums);
            case memopt::FMT_8BIT: return pack<Kind<Signed8, Unsigned8>>(t, slot, place, value, sums);
            case memopt::FMT_FP8: return pack<Kind<SignedFp8, UnsignedFp8>>(t, slot, place, value, sums);
            case memopt::FMT_4BIT: return pack<Kind<Signed4, Unsigned4>>(t, slot, place, value, sums);
            default: return;
        }
    }

  private:
    template <bool, class S, class U> struct Choose { typedef U type; };
    template <class S, class U> struct Choose<true, S, U> { typedef S type; };
    template <class S, class U> using Kind = typename Choose<SIGNED, S, U>::type;
};

// Elements offset ... offset + n - 1 of a signed moment, to be read only, whatever rows and columns the pass goes by.
class Anywhere : public Plain {
    const float* const value;

    INLINE void open(const memopt::Tensor& t, int slot, const Place& at, float* to, Sums& sums) {
        switch (t.formats[slot]) {
            case memopt::FMT_BF16: return unpack<Half>(t, slot, at, to, sums);
            case memopt::FMT_8BIT: return decode<SquareCode<127>, false, 256>(t, slot, at, to);
            case memopt::FMT_FP8: return decode<E4M3<true>, false, 256>(t, slot, at, to);
            case memopt::FMT_4BIT: return decode<SquareCode<7>, true, 128>(t, slot, at, to);
            default: return unpack<Full>(t, slot, at, to, sums);
        }
    }
    template <class Code, bool NIBBLES, int BLOCK>
    static __attribute__((noinline)) void decode(const memopt::Tensor& t, int slot, const Place& at, float* to) {
        const uint8_t* const codes = static_cast<const uint8_t*>(t.data[slot]);
        const int64_t cols = t.whole_cols, per_row = (cols + BLOCK - 1) / BLOCK, line = (cols + 1) / 2;
        for (int i = 0, m; i < at.n; i += m) {
            const int64_t row = (at.offset + i) / cols, c = (at.offset + i) % cols, block = c / BLOCK;
            const int64_t stop = (block + 1) * BLOCK < cols ? (block + 1) * BLOCK : cols;
            m = stop - c < at.n - i ? static_cast<int>(stop - c) : at.n - i;
            alignas(64) uint8_t q[BLOCK + 2 * W] = {};
            alignas(64) float x[BLOCK + 2 * W];
            for (int j = 0; j < m; j++)
                q[j] = NIBBLES ? codes[row * line + (c + j) / 2] >> ((c + j) % 2 * 4) & 15 : codes[at.offset + i + j];
            const float unit = Code::unit(static_cast<const float*>(t.aux[slot])[row * per_row + block]);
            for (int j = 0; j < m; j += W) {
                const vi w = widen(reinterpret_cast<const typename Code::Lane*>(q + j));
                store(x + j, Code::decode(NIBBLES ? (w << 28) >> 28 : w, unit));
            }
            std::memcpy(to + i, x, 4 * m);
        }
    }

  public:
    INLINE_METHOD Anywhere(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums& sums)
        : value(scratch.value) {
        for (int i = place.n; i % W; i++) scratch.value[i] = 0;
        open(t, slot, place, scratch.value, sums);
    }
    INLINE_METHOD vf get(int i) const { return loadf(value + i); }
};

// The formats: what holds the second moment and other non-negative ones (U), what holds the signed one (S), and
// what reads the inverse root of a U where a pass wants that.
struct In32 { typedef Full U, S, R; };
struct InHalf { typedef Half U, S, R; };
struct In8 {
    typedef Unsigned8 U;
    typedef Signed8 S;
    typedef U R;
};
struct InFp8 {
    typedef UnsignedFp8 U;
    typedef SignedFp8 S;
    typedef U R;
};
struct In4 {
    typedef Unsigned4 U;
    typedef Signed4 S;
    typedef U R;
};
template <class Signed> struct BesideFactors { typedef Factored U; typedef Signed S; typedef FactoredRoot R; };
typedef BesideFactors<Full> InFactors;
struct ByRows { typedef RowRoot U; typedef Full S; typedef RowRoot R; };
struct InMixture { typedef Staged<false, false> U; typedef Staged<true, false> S; typedef Staged<false, true> R; };
template <class F> struct BesideRowMeans { typedef RowMean U, R; typedef typename F::S S; };

}  // namespace
