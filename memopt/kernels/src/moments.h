// A chunk (at most 256 columns of one row) of one moment, opened, read and written vector by vector, and closed.
//   get(i)     columns i ... i + W - 1 as fp32; past the end of the row: any finite number
//   put(i, x)  what they become; past the end zeros
//   close()    writes what has to wait for the whole chunk: block codes need the largest magnitude first
#pragma once
#include "halves.h"
#include "codes.h"
#include "table.h"

namespace {

using memopt::Sums;

constexpr int CHUNK = 256;

// Where a chunk is.
struct Place {
    int64_t row, col, offset;  // offset: row * cols + col
    int n;
    bool whole;                // n is a multiple of W
};


struct Absent {
    INLINE_METHOD Absent(const memopt::Tensor&, int, const Place&, const uint32_t*, Sums&) {}
    INLINE_METHOD vf get(int) const { return vf{}; }
    INLINE_METHOD void put(int, vf) {}
    INLINE_METHOD void close() {}
};

class Full {
    float* direct;
    float* at;
    const Place& place;
    alignas(64) float buffer[CHUNK];

  public:
    INLINE_METHOD Full(const memopt::Tensor& t, int slot, const Place& where, const uint32_t*, Sums&) : place(where) {
        direct = at = static_cast<float*>(t.data[slot]) + where.offset;
        if (!where.whole) {
            std::memcpy(buffer, direct, 4 * where.n);
            for (int i = where.n; i % W; i++) buffer[i] = 0;
            at = buffer;
        }
    }
    INLINE_METHOD vf get(int i) const { return loadf(at + i); }
    INLINE_METHOD void put(int i, vf x) { store(at + i, x); }
    INLINE_METHOD void close() {
        if (at != direct) std::memcpy(direct, buffer, 4 * place.n);
    }
};

// memopt/formats/bf16.py: random low bits are added, and the lower half is cut off.
class Half {
    uint16_t* direct;
    uint16_t* at;
    const Place& place;
    const Dither dither;
    alignas(64) uint16_t buffer[CHUNK];

  public:
    INLINE_METHOD Half(const memopt::Tensor& t, int slot, const Place& where, const uint32_t* keys, Sums&)
        : place(where), dither(keys[slot], keys[memopt::SLOTS], where.row + t.first_row) {
        direct = at = static_cast<uint16_t*>(t.data[slot]) + where.offset;
        if (!where.whole) {
            std::memcpy(buffer, direct, 2 * where.n);
            for (int i = where.n; i % W; i++) buffer[i] = 0;
            at = buffer;
        }
    }
    INLINE_METHOD vf get(int i) const { return load_bf16(at + i); }
    INLINE_METHOD void put(int i, vf x) {
        narrow(at + i, (bits(x) + (dither.words(place.col + i) >> 16)) >> 16);
    }
    INLINE_METHOD void close() {
        if (at != direct) std::memcpy(direct, buffer, 2 * place.n);
    }
};

// Codes of one byte, in place where that is possible.
struct Bytes {
    INLINE uint8_t* open(void* data, int64_t row, int64_t cols, int64_t col, int n, uint8_t* buffer) {
        uint8_t* direct = static_cast<uint8_t*>(data) + row * cols + col;
        if (n % W == 0) return direct;
        std::memcpy(buffer, direct, n);
        for (int i = n; i % W; i++) buffer[i] = 0;
        return buffer;
    }
    INLINE void close(void* data, int64_t row, int64_t cols, int64_t col, int n, const uint8_t* at) {
        uint8_t* direct = static_cast<uint8_t*>(data) + row * cols + col;
        if (at != direct) std::memcpy(direct, at, n);
    }
};

// Two codes in a byte, the even column in the low half; rows begin at whole bytes.
struct Nibbles {
    INLINE uint8_t* open(void* data, int64_t row, int64_t cols, int64_t col, int n, uint8_t* buffer) {
        const uint8_t* from = static_cast<uint8_t*>(data) + row * ((cols + 1) / 2) + col / 2;
        uint8_t packed[CHUNK / 2];
        std::memcpy(packed, from, (n + 1) / 2);
        if (n < CHUNK) std::memset(packed + (n + 1) / 2, 0, CHUNK / 2 - (n + 1) / 2);
        uint16_t pairs[CHUNK / 2];
        for (int i = 0; i < CHUNK / 2; i++)
            pairs[i] = static_cast<uint16_t>((packed[i] & 0x0F) | ((packed[i] & 0xF0) << 4));
        std::memcpy(buffer, pairs, CHUNK);
        return buffer;
    }
    INLINE void close(void* data, int64_t row, int64_t cols, int64_t col, int n, uint8_t* at) {
        if (n % 2) at[n] = 0;
        uint16_t pairs[CHUNK / 2];
        std::memcpy(pairs, at, CHUNK);
        uint8_t packed[CHUNK / 2];
        for (int i = 0; i < CHUNK / 2; i++)
            packed[i] = static_cast<uint8_t>((pairs[i] & 0x0F) | ((pairs[i] >> 4) & 0xF0));
        std::memcpy(static_cast<uint8_t*>(data) + row * ((cols + 1) / 2) + col / 2, packed, (n + 1) / 2);
    }
};

// Signed nibbles arrive as 0 ... 15.
template <class Code, class Packing>
INLINE vi extend(vi q) {
    if (sizeof(Packing) && __is_same(Packing, Nibbles) && __is_same(typename Code::Lane, int8_t)) return (q << 28) >> 28;
    return q;
}

template <class Code, class Packing, int BLOCK>
class Coded {
    static constexpr int BLOCKS = CHUNK / BLOCK;
    const memopt::Tensor& tensor;
    const Place& place;
    const int slot;
    const Dither dither;
    uint8_t* at;
    float* scales;
    float unit[BLOCKS];
    vi top[BLOCKS];
    alignas(64) float value[CHUNK];
    alignas(64) uint8_t buffer[CHUNK];

  public:
    INLINE_METHOD Coded(const memopt::Tensor& t, int which, const Place& where, const uint32_t* keys, Sums&)
        : tensor(t), place(where), slot(which), dither(keys[which], keys[memopt::SLOTS], where.row + t.first_row) {
        at = Packing::open(t.data[slot], where.row, t.cols, where.col, where.n, buffer);
        scales = static_cast<float*>(t.aux[slot]) + where.row * ((t.cols + BLOCK - 1) / BLOCK) + where.col / BLOCK;
        for (int b = 0; b < BLOCKS; b++) {
            unit[b] = b * BLOCK < where.n ? Code::unit(scales[b]) : 0.0f;
            top[b] = vi{};
        }
    }
    INLINE_METHOD vf get(int i) const {
        const vi q = widen(reinterpret_cast<const typename Code::Lane*>(at + i));
        return Code::decode(extend<Code, Packing>(q), unit[i / BLOCK]);
    }
    INLINE_METHOD void put(int i, vf x) {
        store(value + i, x);
        // As integers magnitudes are in order, and NaN is above Inf: a block with a NaN gets a scale of NaN.
        top[i / BLOCK] = larger(top[i / BLOCK], (vi)bits(absolute(x)));
    }
    INLINE_METHOD void close() {
        for (int b = 0; b < BLOCKS && b * BLOCK < place.n; b++) {
            const int32_t largest_bits = largest_lane(top[b]);
            float largest;
            __builtin_memcpy(&largest, &largest_bits, 4);
            const float inverse = Code::inverse(largest);
            const int end = place.n < (b + 1) * BLOCK ? place.n : (b + 1) * BLOCK;
            for (int i = b * BLOCK; i < end; i += W)
                narrow(at + i, Code::encode(loadf(value + i), inverse, dither.words(place.col + i)));
            scales[b] = Code::stored(largest);
        }
        Packing::close(tensor.data[slot], place.row, tensor.cols, place.col, place.n, at);
    }
};

// A moment kept as row and column means, x = row * col / mean. `put` adds to the sums from which the new means come.
class Factored {
    const float* col;
    float row;
    Sums& sums;
    float* column;
    vf across{};
    alignas(64) float buffer[CHUNK];

  public:
    INLINE_METHOD Factored(const memopt::Tensor& t, int slot, const Place& where, const uint32_t*, Sums& into) : sums(into) {
        const int64_t matrix = where.row / t.height;
        row = static_cast<const float*>(t.data[slot])[where.row] / into.mean[slot];
        col = static_cast<const float*>(t.aux[slot]) + matrix * t.cols + where.col;
        if (!where.whole) {
            std::memcpy(buffer, col, 4 * where.n);
            for (int i = where.n; i % W; i++) buffer[i] = 0;
            col = buffer;
        }
        column = into.column + (where.col - into.first_col);
    }
    INLINE_METHOD vf get(int i) const { return row * loadf(col + i); }
    INLINE_METHOD void put(int i, vf x) {
        across += x;
        store(column + i, loadf(column + i) + x);
    }
    INLINE_METHOD void close() { sums.row += sum_lanes(across); }
};

// The six formats: what holds the second moment and other non-negative ones (U), what holds the signed one (S).
struct In32 { typedef Full U, S; static constexpr bool factored = false; };
struct InHalf { typedef Half U, S; static constexpr bool factored = false; };
struct In8 {
    typedef Coded<FloatCode<255, 4>, Bytes, 256> U;
    typedef Coded<SquareCode<127>, Bytes, 256> S;
    static constexpr bool factored = false;
};
struct InFp8 {
    typedef Coded<E4M3<false>, Bytes, 256> U;
    typedef Coded<E4M3<true>, Bytes, 256> S;
    static constexpr bool factored = false;
};
struct In4 {
    typedef Coded<FloatCode<15, 0>, Nibbles, 128> U;
    typedef Coded<SquareCode<7>, Nibbles, 128> S;
    static constexpr bool factored = false;
};
struct InFactors { typedef Factored U; typedef Full S; static constexpr bool factored = true; };

}  // namespace
