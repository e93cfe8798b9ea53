// A chunk (at most 1024 columns of one row) of one moment, opened, read and written vector by vector, and closed.
//   open()            before anything else
//   begin(b), end(b)  around the vectors of block b
//   get(i)            columns i ... i + W - 1 as fp32; past the end of the row: any finite number
//   fade(f)           from now on `get` gives f times what is kept: of codes alone, which are multiplied by something anyway
//   put(i, x)         what they become; past the end zeros
//   turn(b), code(i)  what has to wait: block codes need the largest magnitude of their block first; GROUP vectors at once
//   close()           writes what has been changed apart from where it lies
//   ahead(i)          asks the memory for the same columns of a later chunk
#pragma once
#include "state/codes.h"
#include "state/halves.h"
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
    // Of each slot; what the step adds to the momentum's, which is slot 1; the master's, what is added there; what is added
    // to those of the other slots.
    const uint32_t* keys;
    uint32_t turn(int slot) const { return keys[slot == 1 ? memopt::SLOTS : memopt::SLOTS + 3]; }
};

// What the processor foresees by itself ends at every page, which is a chunk of fp32, so it is asked, for every line: one
// chunk ahead, which is soon enough where several arrays are read beside each other; a pass over one array alone asks two
// chunks ahead. One that codes, whose chunks fill the first cache as it is, asks five ahead, for the second.
constexpr int AHEAD = CHUNK;

// Memory of one moment's chunk; apart from the moment itself, whose other members then stay in registers.
struct alignas(64) Scratch {
    float value[CHUNK];
    uint8_t code[CHUNK];
};

// What nothing has to be done for: a moment without blocks, read and written in place.
struct Plain {
    static constexpr int BLOCK = CHUNK;
    static constexpr bool LIES = false;  // a chunk of it is memory of its own
    INLINE_METHOD void ahead(int) const {}
    INLINE_METHOD void begin(int) {}
    INLINE_METHOD void put(int, vf) {}
    INLINE_METHOD void end(int) {}
    INLINE_METHOD void turn(int) {}
    INLINE_METHOD void code(int) {}
    INLINE_METHOD void close() {}
};

struct Absent : Plain {
    INLINE_METHOD Absent(const memopt::Tensor&, int, const Place&, Scratch&, Sums&) {}
    INLINE_METHOD vf get(int) const { return vf{}; }
};

class Full : public Plain {
    float* const direct;
    float* at;
    const int n;

  public:
    static constexpr bool LIES = true;
    INLINE_METHOD Full(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums&)
        : direct(static_cast<float*>(t.data[slot]) + place.offset), n(place.n) {
        at = direct;
        if (!place.whole) {
            at = scratch.value;
            std::memcpy(at, direct, 4 * n);
            for (int i = n; i % W; i++) at[i] = 0;
        }
    }
    INLINE_METHOD vf get(int i) const { return loadf(at + i); }
    INLINE_METHOD void put(int i, vf x) { store(at + i, x); }
    INLINE_METHOD void ahead(int i) const { fetch(direct + AHEAD + i); }
    INLINE_METHOD void close() {
        if (at != direct) std::memcpy(direct, at, 4 * n);
    }
};

// memopt/formats/bf16.py: random low bits are added, and the lower half is cut off.
class Half : public Plain {
    uint16_t* const direct;
    uint16_t* at;
    const int n;
    Dither dither;

  public:
    static constexpr bool LIES = true;
    INLINE_METHOD Half(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums&)
        : direct(static_cast<uint16_t*>(t.data[slot]) + place.offset),
          n(place.n),
          dither(place.keys[slot], place.turn(slot), place.global_row, place.col) {
        at = direct;
        if (!place.whole) {
            at = reinterpret_cast<uint16_t*>(scratch.value);
            std::memcpy(at, direct, 2 * n);
            for (int i = n; i % W; i++) at[i] = 0;
        }
    }
    INLINE_METHOD vf get(int i) const { return load_bf16(at + i); }
    INLINE_METHOD void put(int i, vf x) {
        // Of a NaN all bits may be set: with anything added it would be -0.
        const vu upper = (bits(x) + (dither.next() >> 16)) >> 16;
        narrow(at + i, x == x ? upper : splat(0x7FC0u));
    }
    INLINE_METHOD void ahead(int i) const { fetch(direct + AHEAD + i); }
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
        if (place.n % (GROUP * W) == 0) return from;
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
    float unit, factor = 1;
    vu top;
    vf table;  // of nibbles: what each of the 16 codes stands for in this block
    float largest[CHUNK / SIZE], inverse;

    INLINE vi extend(vi q) { return NIBBLES && Code::HAS_SIGN ? (q << 28) >> 28 : q; }

  public:
    static constexpr int BLOCK = SIZE;
    static constexpr bool LIES = true;
    INLINE_METHOD Coded(const memopt::Tensor& t, int slot, const Place& place, Scratch& scratch, Sums&)
        : tensor(t),
          n(place.n),
          direct(Packing::direct(t, slot, place)),
          value(scratch.value),
          scales(static_cast<float*>(t.aux[slot]) + place.row * ((t.cols + BLOCK - 1) / BLOCK) + place.col / BLOCK),
          dither(place.keys[slot], place.turn(slot), place.global_row, place.col) {
        at = Packing::open(direct, place, scratch.code);
    }
    INLINE_METHOD void fade(float by) { factor = by; }
    INLINE_METHOD void begin(int b) {
        unit = Code::unit(scales[b]) * factor;
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
    INLINE_METHOD void code(int i) {
        Code::encode(at + i, value + i, inverse, dither);
    }
    INLINE_METHOD void ahead(int i) const { fetch_early(direct + (AHEAD + i) * Packing::BITS / 8); }
    INLINE_METHOD void close() { Packing::close(direct, n, at); }
};

}  // namespace
