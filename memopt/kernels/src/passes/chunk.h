// The one loop: open a chunk of every moment, decode -> rule -> encode it vector by vector, close.
#pragma once
#include "state/formats.h"
#include "state/masters.h"
#include "rules.h"
#include "state/sliced.h"
#include "passes/strided.h"

namespace {

template <bool USED, class Kind, bool ROOT = false, class Root = Kind> struct Pick { typedef Kind type; };
template <class Kind, class Root> struct Pick<true, Kind, true, Root> { typedef Root type; };
template <class Kind, bool ROOT, class Root> struct Pick<false, Kind, ROOT, Root> { typedef Absent type; };

constexpr int smallest(int a, int b) { return a < b ? a : b; }

// The slow weights of lookahead() follow the parameter, which then becomes them.
__attribute__((noinline)) void look_ahead(float* slow, float* p, int n, const Lerp& weight) {
    for (int i = 0; i < n; i += W) {
        alignas(64) float tail[W] = {};
        const int left = smallest(n - i, W);
        std::memcpy(tail, slow + i, 4 * left);
        const vf x = lerp(loadf(tail), loadf(p + i), weight);
        store(p + i, x);
        store(tail, x);
        std::memcpy(slow + i, tail, 4 * left);
    }
}

// The gradient times a number, as it would be had it been scaled where it lies: rounded to its dtype.
__attribute__((noinline)) const float* scaled(const float* from, int n, uint8_t dtype, float scale, float* buffer) {
    for (int i = 0; i < n; i += W) {
        const vf x = loadf(from + i) * scale;
        store(buffer + i, dtype == memopt::F32 ? x : dtype == memopt::BF16 ? rounded<Bf16>(x) : rounded<F16>(x));
    }
    return buffer;
}

INLINE const float* negated(const float* from, int n, float* buffer) {
    for (int i = 0; i < n; i++) buffer[i] = -from[i];
    return buffer;
}

template <class Rule, class Format>
INLINE void chunk(const memopt::Tensor& t, const Scalars& s, const Place& at, Sums& sums) {
    typedef typename Pick<Rule::V, typename Format::U, Rule::ROOT_V, typename Format::R>::type V;
    typedef typename Pick<Rule::M, typename Format::S>::type M;
    typedef typename Pick<Rule::X_SIGNED, typename Format::S, Rule::SLICED, Sliced>::type Signed;
    typedef typename Pick<Rule::Y, Signed>::type Y;
    typedef typename Pick<Rule::X, typename Format::U, Rule::X_SIGNED || Rule::ROOT_X,
                          typename Pick<true, typename Format::R, Rule::X_SIGNED, Signed>::type>::type X;
    constexpr int BLOCK = smallest(smallest(V::BLOCK, M::BLOCK), smallest(X::BLOCK, Y::BLOCK));
    constexpr bool CODES = BLOCK < CHUNK;
    constexpr int ARRAYS = Rule::P + Rule::G + V::LIES + M::LIES + X::LIES + Y::LIES;
    constexpr int FURTHER = CODES ? 4 * CHUNK : ARRAYS == 1 ? CHUNK : 0;
    Scratch v_scratch, m_scratch, x_scratch, y_scratch;
    alignas(64) float p_buffer[CHUNK];
    alignas(64) float g_buffer[CHUNK];
    alignas(64) float p_together[CHUNK];
    alignas(64) float g_together[CHUNK];
    void* p_lies = element(t.p, at.offset, t.p_dtype);
    const void* g_lies = element(const_cast<void*>(t.g), at.offset, t.g_dtype);
    if (__builtin_expect(t.layout != nullptr, 0)) {
        if (Rule::P) gather(t.p, t, strides_of_p(t), t.p_dtype, at.offset, at.n, p_lies = p_together);
        if (Rule::G) gather(t.g, t, strides_of_g(t), t.g_dtype, at.offset, at.n, g_together);
        g_lies = g_together;
    }
    const char* const p_ahead = static_cast<const char*>(element(t.p, at.offset + AHEAD + FURTHER, t.p_dtype));
    const char* const g_ahead = static_cast<const char*>(element(const_cast<void*>(t.g), at.offset + AHEAD + FURTHER, t.g_dtype));
    const int p_size = size_of(t.p_dtype), g_size = size_of(t.g_dtype);
    float* p = p_buffer;
    if (Rule::P) p = const_cast<float*>(load_weights(t, p_lies, at, p_buffer));
    const float* g = p;
    if (Rule::G) g = load_numbers(g_lies, at.n, t.g_dtype, g_buffer);
    if (Rule::G && s.scaled) g = scaled(g, at.n, t.g_dtype, s.gradient_scale, g_buffer);
    if (Rule::G && __builtin_expect(s.gradient_sign != 0, 0)) g = negated(g, at.n, g_buffer);
    V v(t, 0, at, v_scratch, sums);
    M m(t, 1, at, m_scratch, sums);
    X x(t, 2, at, x_scratch, sums);
    Y y(t, 3, at, y_scratch, sums);
    if constexpr (Rule::FADES_V) v.fade(s.beta2);
    if constexpr (Rule::FADES_M) m.fade(1.0f - s.first.weight);
    // Of a chunk, at most 64 terms in each lane; what comes of chunks is added up in fp64, and terms are where ranks
    // share the tensor, so that it does not show where it is cut.
    vf total{}, squares{};
    vd exact_total{}, exact_squares{};
    const auto add = [&](vf& sum, vd& exact, vf term) __attribute__((always_inline)) {
        if (__builtin_expect(t.cut, 0)) exact += __builtin_convertvector(term, vd);
        else sum += term;
    };
    if (Rule::W_P && __builtin_expect(s.begins, 0)) std::memcpy(t.slow + at.offset, p, 4 * at.n);
    const auto step = [&](int i, int stop) __attribute__((always_inline)) {
        vf pi = Rule::P ? loadf(p + i) : vf{};
        const vf gi = Rule::G ? loadf(g + i) : vf{};
        vf v_i = v.get(i), m_i = m.get(i), x_i = x.get(i), y_i = y.get(i);
        if (Rule::SQUARES) add(squares, exact_squares, pi * pi);  // zeros past the end
        vf term;
        if constexpr (Rule::Y) term = Rule::apply(pi, gi, v_i, m_i, x_i, y_i, s);
        else term = Rule::apply(pi, gi, v_i, m_i, x_i, s);
        if constexpr (Rule::SLICED) y_i = y.only_kept(i, y_i);
        if (__builtin_expect(stop - i < W, 0)) {  // lanes past the end of the row count for nothing
            const vi live = (vi)iota() < (stop - i);
            term = live ? term : vf{};
            v_i = live ? v_i : vf{};
            m_i = live ? m_i : vf{};
            x_i = live ? x_i : vf{};
            y_i = live ? y_i : vf{};
        }
        if (Rule::SUMS) add(total, exact_total, term);
        if (Rule::Y) add(squares, exact_squares, absolute(y_i));
        if (Rule::W_P) store(p + i, pi);
        if (Rule::W_V) v.put(i, v_i);
        if (Rule::W_M) m.put(i, m_i);
        if (Rule::W_X) x.put(i, x_i);
        if (Rule::Y) y.put(i, y_i);
    };
    // Asks for the same columns of a later chunk (moments.h).
    const auto ask = [&](int i) __attribute__((always_inline)) {
        if (Rule::P) fetch(p_ahead + i * p_size);
        if (Rule::G) fetch(g_ahead + i * g_size);
        v.ahead(i + FURTHER);
        m.ahead(i + FURTHER);
        x.ahead(i + FURTHER);
        y.ahead(i + FURTHER);
    };
    for (int b = 0; b * BLOCK < at.n; b++) {
        v.begin(b);
        m.begin(b);
        x.begin(b);
        y.begin(b);
        const int stop = smallest((b + 1) * BLOCK, at.n);
        for (int i = b * BLOCK; i < stop; i += W) {
            if (CODES && Rule::P) fetch_early(p_ahead + i * p_size);
            if (!CODES) ask(i);
            step(i, stop);
        }
        if (Rule::W_V) v.end(b);
        if (Rule::W_M) m.end(b);
        if (Rule::W_X) x.end(b);
        if (Rule::Y) y.end(b);
    }
    // Coded moments are written when the largest magnitude of their block is known, all of them in one loop: one's
    // square roots are taken beside the other's additions.
    for (int b = 0; CODES && b * BLOCK < at.n; b++) {
        if (Rule::W_V) v.turn(b);
        if (Rule::W_M) m.turn(b);
        if (Rule::W_X) x.turn(b);
        if (Rule::Y) y.turn(b);
        const int stop = smallest((b + 1) * BLOCK, at.n);
        for (int i = b * BLOCK; i < stop; i += GROUP * W) {
            for (int k = i; Rule::G && k < i + GROUP * W; k += W) fetch_early(g_ahead + k * g_size);
            v.ahead(i + FURTHER);
            m.ahead(i + FURTHER);
            x.ahead(i + FURTHER);
            y.ahead(i + FURTHER);
            if (Rule::W_V) v.code(i);
            if (Rule::W_M) m.code(i);
            if (Rule::W_X) x.code(i);
            if (Rule::Y) y.code(i);
        }
    }
    if (Rule::W_V) v.close();
    if (Rule::W_M) m.close();
    if (Rule::W_X) x.close();
    if (Rule::Y) y.close();
    if (Rule::W_P && __builtin_expect(s.returns, 0)) look_ahead(t.slow + at.offset, p, at.n, s.slow);
    if (Rule::W_P) store_weights(t, p_lies, at, p);
    if (Rule::W_P && __builtin_expect(t.layout != nullptr, 0))
        scatter(p_lies, t, strides_of_p(t), t.p_dtype, at.offset, at.n, t.p);
    if (Rule::SUMS) sums.total += sum_lanes(__builtin_convertvector(total, vd) + exact_total);
    if (Rule::SQUARES || Rule::Y) sums.squares += sum_lanes(__builtin_convertvector(squares, vd) + exact_squares);
}

// Chunks first ... last - 1 of a tensor, counted along its rows.
template <class Rule, class Format>
void run(const memopt::Tensor& t, const Scalars& scalars, const uint32_t* keys, int64_t first, int64_t last,
         Sums& sums) {
    const Scalars s = scalars;  // a copy of our own: nothing that is written can be thought to change it
    const int64_t per_row = memopt::chunks_of(t.cols);
    Place at;
    at.keys = keys;
    at.row = first / per_row;
    at.col = first % per_row * CHUNK;
    for (int64_t c = first; c < last; c++) {
        at.offset = at.row * t.cols + at.col;
        at.global_row = at.row + t.first_row;
        const int64_t left_in_row = t.cols - at.col, left = t.numel - at.offset;
        const int64_t n = left_in_row < left ? left_in_row : left;
        at.n = static_cast<int>(n < CHUNK ? n : CHUNK);
        at.whole = at.n % W == 0;
        chunk<Rule, Format>(t, s, at, sums);
        at.col += CHUNK;
        if (at.col >= t.cols) {
            at.col = 0;
            at.row++;
        }
    }
}

}  // namespace
