// The one loop: open a chunk of every moment, decode -> rule -> encode it vector by vector, close.
#pragma once
#include "moments.h"
#include "rules.h"

namespace {

template <bool USED, class Kind> struct Pick { typedef Kind type; };
template <class Kind> struct Pick<false, Kind> { typedef Absent type; };

template <class Rule, class Format>
INLINE void chunk(const memopt::Tensor& t, const Scalars& s, const uint32_t* keys, const Place& at, Sums& sums) {
    alignas(64) float p_buffer[CHUNK];
    alignas(64) float g_buffer[CHUNK];
    float* p = p_buffer;
    if (Rule::P) p = const_cast<float*>(load_numbers(t.p, at.offset, at.n, t.p_dtype, p_buffer));
    const float* g = load_numbers(t.g, at.offset, at.n, t.g_dtype, g_buffer);
    typename Pick<Rule::V, typename Format::U>::type v(t, 0, at, keys, sums);
    typename Pick<Rule::M, typename Format::S>::type m(t, 1, at, keys, sums);
    typename Pick<Rule::X, typename Format::U>::type x(t, 2, at, keys, sums);
    vf total{};
    for (int i = 0; i < at.n; i += W) {
        vf pi = Rule::P ? loadf(p + i) : vf{};
        const vf gi = number(bits(loadf(g + i)) ^ s.gradient_sign);
        vf vi_ = v.get(i), mi = m.get(i), xi = x.get(i);
        vf term = Rule::apply(pi, gi, vi_, mi, xi, s);
        if (__builtin_expect(at.n - i < W, 0)) {  // lanes past the end of the row count for nothing
            const vi live = (vi)iota() < (at.n - i);
            term = live ? term : vf{};
            vi_ = live ? vi_ : vf{};
            mi = live ? mi : vf{};
            xi = live ? xi : vf{};
        }
        total += term;
        if (Rule::W_P) store(p + i, pi);
        if (Rule::W_V) v.put(i, vi_);
        if (Rule::W_M) m.put(i, mi);
        if (Rule::W_X) x.put(i, xi);
    }
    if (Rule::W_V) v.close();
    if (Rule::W_M) m.close();
    if (Rule::W_X) x.close();
    if (Rule::W_P) store_numbers(t.p, at.offset, at.n, t.p_dtype, p);
    if (!Rule::W_P) sums.total += sum_lanes(total);
}

// Chunks first ... last - 1 of a tensor, counted along its rows.
template <class Rule, class Format>
void run(const memopt::Tensor& t, const Scalars& scalars, const uint32_t* keys, int64_t first, int64_t last,
         Sums& sums) {
    const Scalars s = scalars;  // a copy of our own: nothing that is written can be thought to change it
    const int64_t per_row = (t.cols + CHUNK - 1) / CHUNK;
    Place at;
    at.row = first / per_row;
    at.col = first % per_row * CHUNK;
    for (int64_t c = first; c < last; c++) {
        at.offset = at.row * t.cols + at.col;
        const int64_t left_in_row = t.cols - at.col, left = t.numel - at.offset;
        const int64_t n = left_in_row < left ? left_in_row : left;
        at.n = static_cast<int>(n < CHUNK ? n : CHUNK);
        at.whole = at.n % W == 0;
        chunk<Rule, Format>(t, s, keys, at, sums);
        at.col += CHUNK;
        if (at.col >= t.cols) {
            at.col = 0;
            at.row++;
        }
    }
}

}  // namespace
