// The masters of memopt/masters: what a 16-bit parameter and the tensor beside it stand for, read into fp32 and written
// back. One function each, called for a chunk: the loop of every rule and format meets fp32 numbers only.
#pragma once
#include "state/moments.h"

namespace {

// The two 16-bit dtypes; `pattern` is that of memopt/masters/pattern.py: a magnitude whose upper bits are the number.
struct Bf16 {
    static constexpr int SHIFT = 16;
    static constexpr float SCALE = 1.0f;  // of Kahan's compensation
    static constexpr uint32_t INF = 0x7F80u;
    INLINE vf load(const uint16_t* from) { return load_bf16(from); }
    INLINE void store(uint16_t* to, vf x) { store_bf16(to, x); }
    INLINE vu pattern(vf size) { return bits(size); }
    INLINE vf from_pattern(vu pattern) { return number(pattern); }
    INLINE vi regular(vf size) { return size < splat(__builtin_inff()); }
};
struct F16 {
    static constexpr int SHIFT = 13;
    static constexpr float SCALE = 4096.0f;
    static constexpr uint32_t INF = 0x7C00u;
    INLINE vf load(const uint16_t* from) { return load_f16(from); }
    INLINE void store(uint16_t* to, vf x) { store_f16(to, x); }
    INLINE vu pattern(vf size) { return bits(size * 0x1p-112f); }
    INLINE vf from_pattern(vu pattern) { return number(pattern) * 0x1p112f; }
    INLINE vi regular(vf size) { return size < splat(65536.0f); }
};

// x rounded to nearest even.
template <class D> INLINE vf rounded(vf x) {
    uint16_t there[W];
    D::store(there, x);
    return D::load(there);
}

// What is wider than a 16-bit number: the magnitude as an integer, its sign apart; zero for what has no pattern.
template <class D> struct Wide {
    vu pattern, sign;
    vi regular;
    INLINE_METHOD explicit Wide(vf x)
        : sign((bits(x) >> 16) & 0x8000u), regular(D::regular(absolute(x))) {
        pattern = D::pattern(regular ? absolute(x) : vf{});
    }
    // The 16-bit number with this magnitude where x has one, else x itself.
    INLINE_METHOD void put(uint16_t* to, vu magnitude, vf x) const {
        uint16_t irregular[W];
        D::store(irregular, x);
        narrow(to, regular ? magnitude | sign : widen(irregular));
    }
};

// Each master: Beside is the element of the tensor beside the parameter; read and write one vector.
template <class D> struct FullCopy {
    typedef float Beside;
    INLINE vf read(const uint16_t* p, const float* kept) {
        const vf weight = D::load(p), master = loadf(kept);
        return rounded<D>(master) == weight ? master : weight;
    }
    INLINE void write(vf x, uint16_t* p, float* kept, Dither&) {
        D::store(p, x);
        store(kept, x);
    }
};

template <class D> struct Kahan {
    typedef uint16_t Beside;
    INLINE vf read(const uint16_t* p, const uint16_t* kept) {
        const vf weight = D::load(p), c = D::load(kept);
        const vf nearly = fma(c, splat((1.0f - 0x1p-7f) / D::SCALE), weight);
        return rounded<D>(nearly) == weight ? fma(c, splat(1.0f / D::SCALE), weight) : weight;
    }
    INLINE void write(vf x, uint16_t* p, uint16_t* kept, Dither&) {
        D::store(p, x);
        const vf c = (x - D::load(p)) * D::SCALE;
        D::store(kept, absolute(c) < splat(__builtin_inff()) ? c : vf{});
    }
};

template <class D> struct Stochastic {
    typedef uint16_t Beside;  // there is none
    INLINE vf read(const uint16_t* p, const uint16_t*) { return D::load(p); }
    INLINE void write(vf x, uint16_t* p, uint16_t*, Dither& dither) {
        const Wide<D> wide(x);
        wide.put(p, (wide.pattern + (dither.next() >> (32 - D::SHIFT))) >> D::SHIFT, x);
    }
};

template <class D, class Correction> struct Split {
    typedef Correction Beside;
    static constexpr int BITS = 8 * sizeof(Correction), K = BITS < D::SHIFT ? BITS : D::SHIFT, DROP = D::SHIFT - K;
    INLINE vf read(const uint16_t* p, const Correction* kept) {
        const vu h = widen(p), magnitude = h & 0x7FFFu;
        const vi correction = widen_signed(kept);
        const vu pattern = (magnitude << D::SHIFT) + ((vu)correction << DROP);
        const vi own = ((vi)magnitude < (int)D::INF) & ((correction >= 0) | (magnitude != 0u));
        const vf value = number(bits(D::from_pattern(own ? pattern : vu{})) | (h & 0x8000u) << 16);
        return own ? value : D::load(p);
    }
    INLINE void write(vf x, uint16_t* p, Correction* kept, Dither& dither) {
        const Wide<D> wide(x);
        vu q = wide.pattern;
        if (DROP && BITS == 8) q = (q + (dither.next() >> (32 - (DROP ? DROP : 1)))) >> DROP;
        const vu upper = (q + (1u << (K - 1))) >> K;
        wide.put(p, upper, x);
        const vi rest = (vi)(q - (upper << K));
        if (BITS == 8) narrow(reinterpret_cast<uint8_t*>(kept), rest);
        else narrow(reinterpret_cast<uint16_t*>(kept), (vu)rest);
    }
    INLINE vi widen_signed(const int8_t* from) { return widen(from); }
    INLINE vi widen_signed(const int16_t* from) {
        return (vi)(widen(reinterpret_cast<const uint16_t*>(from)) << 16) >> 16;
    }
};

// Whole vectors where they lie, the last columns of a row in memory of their own.
template <class M>
void read_with(const memopt::Tensor& t, const void* lies, const Place& at, float* buffer) {
    const uint16_t* p = static_cast<const uint16_t*>(lies);
    typedef typename M::Beside Beside;
    const Beside* kept = t.kept ? static_cast<const Beside*>(t.kept) + at.offset : nullptr;
    const int whole = at.n - at.n % W;
    for (int i = 0; i < whole; i += W) store(buffer + i, M::read(p + i, kept + (kept ? i : 0)));
    if (at.n > whole) {
        uint16_t p_tail[W] = {};
        Beside kept_tail[W] = {};
        std::memcpy(p_tail, p + whole, sizeof(uint16_t) * (at.n - whole));
        if (kept) std::memcpy(kept_tail, kept + whole, sizeof(Beside) * (at.n - whole));
        store(buffer + whole, M::read(p_tail, kept_tail));
    }
}

template <class M>
void write_with(const memopt::Tensor& t, void* lies, const Place& at, const float* buffer) {
    uint16_t* p = static_cast<uint16_t*>(lies);
    typedef typename M::Beside Beside;
    Beside* kept = t.kept ? static_cast<Beside*>(t.kept) + at.offset : nullptr;
    Dither dither(at.keys[memopt::SLOTS + 1], at.keys[memopt::SLOTS + 2], at.global_row, at.col);
    const int whole = at.n - at.n % W;
    for (int i = 0; i < whole; i += W) M::write(loadf(buffer + i), p + i, kept + (kept ? i : 0), dither);
    if (at.n > whole) {
        uint16_t p_tail[W];
        Beside kept_tail[W];
        M::write(loadf(buffer + whole), p_tail, kept_tail, dither);
        std::memcpy(p + whole, p_tail, sizeof(uint16_t) * (at.n - whole));
        if (kept) std::memcpy(kept + whole, kept_tail, sizeof(Beside) * (at.n - whole));
    }
}

template <class D>
__attribute__((noinline)) void read_master(const memopt::Tensor& t, const void* lies, const Place& at, float* buffer) {
    switch (t.master) {
        case memopt::FP32_COPY: return read_with<FullCopy<D>>(t, lies, at, buffer);
        case memopt::KAHAN: return read_with<Kahan<D>>(t, lies, at, buffer);
        case memopt::STOCHASTIC: return read_with<Stochastic<D>>(t, lies, at, buffer);
        case memopt::SPLIT: return read_with<Split<D, int8_t>>(t, lies, at, buffer);
        case memopt::SPLIT16: return read_with<Split<D, int16_t>>(t, lies, at, buffer);
    }
}

template <class D>
__attribute__((noinline)) void write_master(const memopt::Tensor& t, void* lies, const Place& at, const float* buffer) {
    switch (t.master) {
        case memopt::FP32_COPY: return write_with<FullCopy<D>>(t, lies, at, buffer);
        case memopt::KAHAN: return write_with<Kahan<D>>(t, lies, at, buffer);
        case memopt::STOCHASTIC: return write_with<Stochastic<D>>(t, lies, at, buffer);
        case memopt::SPLIT: return write_with<Split<D, int8_t>>(t, lies, at, buffer);
        case memopt::SPLIT16: return write_with<Split<D, int16_t>>(t, lies, at, buffer);
    }
}

// n numbers of the parameter, which lie there, zeros up to a whole vector.
INLINE const float* load_weights(const memopt::Tensor& t, const void* lies, const Place& at, float* buffer) {
    if (__builtin_expect(t.master == memopt::ROUNDED, 1))
        return load_numbers(lies, at.n, t.p_dtype, buffer);
    t.p_dtype == memopt::BF16 ? read_master<Bf16>(t, lies, at, buffer) : read_master<F16>(t, lies, at, buffer);
    return buffer;
}
INLINE void store_weights(const memopt::Tensor& t, void* lies, const Place& at, const float* buffer) {
    if (__builtin_expect(t.master == memopt::ROUNDED, 1))
        return store_numbers(lies, at.n, t.p_dtype, buffer);
    t.p_dtype == memopt::BF16 ? write_master<Bf16>(t, lies, at, buffer) : write_master<F16>(t, lies, at, buffer);
}

}  // namespace
