// Prodigy (memopt/rules/prodigy.py), in one pass: what it sums over all parameters counts from the next step on.
#pragma once
#include "passes/chunk.h"

namespace {

// The third moment is the way from where the weights began, the fourth the weighted sum of gradients, whose magnitudes
// are summed beside the inner products of gradients and ways.
template <bool FACTORED, bool IN_SLICES>
struct Prodigy : Reads {
    static constexpr bool V = true, M = true, X = true, X_SIGNED = true, Y = true, SLICED = IN_SLICES, SUMS = true;
    static constexpr bool W_V = !FACTORED, W_M = true, W_X = true;
    INLINE vf apply(vf& p, vf g, vf& v, vf& m, vf& x, vf& y, const Scalars& s) {
        g = with_decay(g, p, s);
        const vf toward = g * x, before = p;
        y = fma(g, splat(s.first_bias), y * s.mixed);
        m = fma(g, splat(s.dampening), m * s.kept);
        if (!FACTORED) v = second_moment(v, g, s);
        p = p - p * s.shrink;
        p = p - bounded<FACTORED>(m * s.lr / (root(v) + s.eps), s);
        x = x + (before - p);
        return toward;
    }
};
template <bool F> using ProdigyWhole = Prodigy<F, false>;

// Beside statistics of a sample, in one way for all formats but the commonest: each way is more for the compiler to do.
void fill_prodigy_sliced(memopt::Run* row) {
    for (int f = 0; f < memopt::FORMATS; f++)
        row[f] = memopt::is_factored(f) ? run<Prodigy<true, true>, InMixture> : run<Prodigy<false, true>, InMixture>;
    row[memopt::FMT_8BIT] = run<Prodigy<false, true>, In8>;
}

}  // namespace
