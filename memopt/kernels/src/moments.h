// A chunk (at most 1024 columns of one row) of one moment, opened, read and written vector by vector, and closed.
//   open()            before anything else
//   begin(b), end(b)  around the vectors of block b
//   get(i)            columns i ... i + W - 1 as fp32; past the end of the row: any finite number
//   put(i, x)         what they become; past the end zeros
//   close()           writes what has to wait: block codes need the largest magnitude of their block first
#pragma once
#include "codes.h"
#include "halves.h"
#include "table.h"

namespace {

using memopt::CHUNK;
using memopt::Sums;

// Where a chunk is.
struct Place {
    int64_t row, col, offset;  // offset: row * cols + col
    int n;
    bool whole;                // n is a multiple of W
    int64_t global_row;        // of the whole parameter
    const uint32_t* keys;      // of each slot, behind them what the step adds, and the master's
};

// Memory of one moment's chunk; apart from the moment itself, whose other members then stay in registers.
struct alignas(64) Scratch {
    float value[CHUNK];
    uint8_t code[CHUNK];
};

struct Absent {
    static constexpr int BLOCK = CHUNK;
    INLINE_METHOD Absent(const memopt::Tensor&, int, const Place&, Scratch&, Sums&) {}
    INLINE_METHOD void begin(int) {}
    INLINE_METHOD vf get(int) const { return vf{}; }
    INLINE_METHOD void put(int, vf) {}
    INLINE_METHOD void end(int) {}
    INLINE_METHOD void turn(int) {}
    INLINE_METHOD void code(int) {}
    INLINE_METHOD void close() {}
};

class Full {
    float* const direct;
    float* at;
    const int n;

  public:
    static constexpr int BLOCK = CHUNK;
    INLINE_METHOD Full(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums&)
        : direct(static_cast<float*>(t.data[slot]) + place.offset), n(place.n) {
        at = direct;
        if (!place.whole) {
            at = scratch.value;
            std::memcpy(at, direct, 4 * n);
            for (int i = n; i % W; i++) at[i] = 0;
        }
    }
    INLINE_METHOD void begin(int) {}
    INLINE_METHOD vf get(int i) const { return loadf(at + i); }
    INLINE_METHOD void put(int i, vf x) { store(at + i, x); }
    INLINE_METHOD void end(int) {}
    INLINE_METHOD void turn(int) {}
    INLINE_METHOD void code(int) {}
    INLINE_METHOD void close() {
        if (at != direct) std::memcpy(direct, at, 4 * n);
    }
};

// memopt/formats/bf16.py: random low bits are added, and the lower half is cut off.
class Half {
    uint16_t* const direct;
    uint16_t* at;
    const int n;
    Dither dither;

  public:
    static constexpr int BLOCK = CHUNK;
    INLINE_METHOD Half(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums&)
        : direct(static_cast<uint16_t*>(t.data[slot]) + place.offset),
          n(place.n),
          dither(place.keys[slot], place.keys[memopt::SLOTS], place.global_row, place.col) {
        at = direct;
        if (!place.whole) {
            at = reinterpret_cast<uint16_t*>(scratch.value);
            std::memcpy(at, direct, 2 * n);
            for (int i = n; i % W; i++) at[i] = 0;
        }
    }
    INLINE_METHOD void begin(int) {}
    INLINE_METHOD vf get(int i) const { return load_bf16(at + i); }
    INLINE_METHOD void put(int i, vf x) { narrow(at + i, (bits(x) + (dither.next() >> 16)) >> 16); }
    INLINE_METHOD void end(int) {}
    INLINE_METHOD void turn(int) {}
    INLINE_METHOD void code(int) {}
    INLINE_METHOD void close() {
        if (at != direct) std::memcpy(direct, at, 2 * n);
    }
};

// Codes of one byte, in place where that is possible.
struct Bytes {
    static constexpr int BITS = 8;
    INLINE uint8_t* direct(const memopt::Tensor& t, int slot, const Place& place) {
        return static_cast<uint8_t*>(t.data[slot]) + place.offset;
    }
    INLINE uint8_t* open(uint8_t* from, const Place& place, uint8_t* buffer) {
        if (place.whole) return from;
        std::memcpy(buffer, from, place.n);
        for (int i = place.n; i % W; i++) buffer[i] = 0;
        return buffer;
    }
    INLINE void close(uint8_t* to, int n, uint8_t* at) {
        if (at != to) std::memcpy(to, at, n);
    }
};

// Two codes in a byte, the even column in the low half; rows begin at whole bytes.
struct Nibbles {
    static constexpr int BITS = 4;
    INLINE uint8_t* direct(const memopt::Tensor& t, int slot, const Place& place) {
        return static_cast<uint8_t*>(t.data[slot]) + place.row * ((t.cols + 1) / 2) + place.col / 2;
    }
    INLINE uint8_t* open(uint8_t* from, const Place& place, uint8_t* buffer) {
        const int bytes = (place.n + 1) / 2;
        for (int i = 0; i < bytes; i++) {
            const uint16_t pair = static_cast<uint16_t>((from[i] & 0x0F) | ((from[i] & 0xF0) << 4));
            __builtin_memcpy(buffer + 2 * i, &pair, 2);
        }
        for (int i = 2 * bytes; i % W; i++) buffer[i] = 0;
        return buffer;
    }
    INLINE void close(uint8_t* to, int n, uint8_t* at) {
        if (n % 2) at[n] = 0;
        for (int i = 0; i < (n + 1) / 2; i++) {
            uint16_t pair;
            __builtin_memcpy(&pair, at + 2 * i, 2);
            to[i] = static_cast<uint8_t>((pair & 0x0F) | ((pair >> 4) & 0xF0));
        }
    }
};

template <class Code, class Packing, int SIZE>
class Coded {
    static constexpr bool NIBBLES = Packing::BITS == 4;
    const memopt::Tensor& tensor;
    const int n;
    uint8_t* const direct;
    uint8_t* at;
    float* const value;
    float* const scales;
    Dither dither;
    float unit;
    vu top;
    vf table;  // of nibbles: what each of the 16 codes stands for in this block
    float largest[CHUNK / SIZE], inverse;

    INLINE vi extend(vi q) { return NIBBLES && Code::HAS_SIGN ? (q << 28) >> 28 : q; }

  public:
    static constexpr int BLOCK = SIZE;
    INLINE_METHOD Coded(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums&)
        : tensor(t),
          n(place.n),
          direct(Packing::direct(t, slot, place)),
          value(scratch.value),
          scales(static_cast<float*>(t.aux[slot]) + place.row * ((t.cols + BLOCK - 1) / BLOCK) + place.col / BLOCK),
          dither(place.keys[slot], place.keys[memopt::SLOTS], place.global_row, place.col) {
        at = Packing::open(direct, place, scratch.code);
    }
    INLINE_METHOD void begin(int b) {
        unit = Code::unit(scales[b]);
        top = vu{};
#if LANES_512
        if (NIBBLES) table = Code::decode(extend((vi)iota()), unit);
#endif
    }
    INLINE_METHOD vf get(int i) const {
#if LANES_512
        if (NIBBLES) return _mm512_permutexvar_ps((__m512i)widen(at + i), table);
#endif
        return Code::decode(extend(widen(reinterpret_cast<const typename Code::Lane*>(at + i))), unit);
    }
    INLINE_METHOD void put(int i, vf x) {
        store(value + i, x);
        // As integers magnitudes are in order, and NaN is above Inf: a block with a NaN gets a scale of NaN.
        top = larger(top, bits(Code::HAS_SIGN ? absolute(x) : x));
    }
    INLINE_METHOD void end(int b) {
        const uint32_t largest_bits = largest_lane(top);
        __builtin_memcpy(&largest[b], &largest_bits, 4);
        scales[b] = Code::stored(largest[b]);
    }
    INLINE_METHOD void turn(int b) { inverse = Code::inverse(largest[b]); }
    INLINE_METHOD void code(int i) { narrow(at + i, Code::encode(loadf(value + i), inverse, dither.next())); }
    INLINE_METHOD void close() { Packing::close(direct, n, at); }
};

// A moment kept as row and column means, x = row * col / mean. `put` adds to the sums from which the new means come.
class Factored {
    const float* col;
    float row;
    Sums& sums;
    float* const column;
    vf across{};

  public:
    static constexpr int BLOCK = CHUNK;
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
    INLINE_METHOD void begin(int) {}
    INLINE_METHOD vf get(int i) const { return row * loadf(col + i); }
    INLINE_METHOD void put(int i, vf x) {
        across += x;
        store(column + i, loadf(column + i) + x);
    }
    INLINE_METHOD void end(int) {}
    INLINE_METHOD void turn(int) {}
    INLINE_METHOD void code(int) {}
    INLINE_METHOD void close() { sums.row += sum_lanes(__builtin_convertvector(across, vd)); }
};

// The same moment, read as 1 / sqrt(x).
class FactoredRoot {
    const float* root;
    float row;

  public:
    static constexpr int BLOCK = CHUNK;
    INLINE_METHOD FactoredRoot(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums& sums) {
        row = 1.0f / __builtin_sqrtf(static_cast<const float*>(t.data[slot])[place.row] / sums.mean[slot]);
        root = sums.root[slot] + (place.col - sums.first_col);
        if (!place.whole) {
            std::memcpy(scratch.value, root, 4 * place.n);
            for (int i = place.n; i % W; i++) scratch.value[i] = 0;
            root = scratch.value;
        }
    }
    INLINE_METHOD void begin(int) {}
    INLINE_METHOD vf get(int i) const { return row * loadf(root + i); }
    INLINE_METHOD void put(int, vf) {}
    INLINE_METHOD void end(int) {}
    INLINE_METHOD void turn(int) {}
    INLINE_METHOD void code(int) {}
    INLINE_METHOD void close() {}
};

// One number for each run of `span` elements, which an earlier pass has written.
class RowMean {
    const float* const value;

  public:
    static constexpr int BLOCK = CHUNK;
    INLINE_METHOD RowMean(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums&)
        : value(scratch.value) {
        const float* mean = static_cast<const float*>(t.data[slot]) + place.offset / t.span;
        int64_t stop = t.span - place.offset % t.span;  // from here on the next one's
        for (int i = 0; i < place.n; stop += t.span, mean++)
            for (const int end = stop < place.n ? stop : place.n; i < end; i++) scratch.value[i] = *mean;
        for (int i = place.n; i % W; i++) scratch.value[i] = 0;
    }
    INLINE_METHOD void begin(int) {}
    INLINE_METHOD vf get(int i) const { return loadf(value + i); }
    INLINE_METHOD void put(int, vf) {}
    INLINE_METHOD void end(int) {}
    INLINE_METHOD void turn(int) {}
    INLINE_METHOD void code(int) {}
    INLINE_METHOD void close() {}
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
