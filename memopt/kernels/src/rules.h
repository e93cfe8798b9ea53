// The rules of memopt/rules, one vector of elements at a time. Each struct is one pass over a tensor:
//   V, M, X          which of the three moments it reads; W_V, W_M, W_X which it writes; P, W_P the same of p
//   G                whether it reads the gradient; SUMS whether `apply` returns what is summed over the tensor;
//   SQUARES          whether the squares of p, as it is before `apply`, are
//   X_SIGNED         whether the third moment may be negative
//   Y                whether it has a fourth one, signed, which it writes, and whose magnitudes are summed
//   FADES_V, FADES_M whether it reads v times beta2, m times beta1: of codes, where that costs nothing
//   SLICED           whether the third and the fourth are kept of every eleventh element alone
// FACTORED: the second moment read is the reconstruction from new means, so it is not updated here.
#pragma once
#include "table.h"
#include "vec.h"

namespace {

using memopt::Lerp;
using memopt::Scalars;

INLINE vf lerp(vf a, vf b, const Lerp& w) {
    return w.from_end ? fma(splat(w.weight - 1.0f), b - a, b) : fma(splat(w.weight), b - a, a);
}
INLINE vf with_decay(vf g, vf p, const Scalars& s) { return s.coupled ? fma(p, splat(s.l2), g) : g; }
INLINE vf second_moment(vf v, vf g, const Scalars& s) { return fma(s.one_minus_beta2 * g, g, v * s.beta2); }
INLINE vf at_least(vf x, float floor) { return x < floor ? splat(floor) : x; }  // a NaN stays
// Where the second moment does not know the element (memopt/rules/adamw.py).
template <bool FACTORED>
INLINE vf bounded(vf u, const Scalars& s) {
    if (!FACTORED) return u;
    u = u > s.longest ? splat(s.longest) : u;
    return u < -s.longest ? splat(-s.longest) : u;
}
INLINE vf inverse_root(vf x) { return 1.0f / root(x); }

//   ROOT_V, ROOT_X   of a factored moment it reads 1 / sqrt(x) instead of x: a product, where every element of a
//                    reconstruction would need a root and a division
struct Reads {
    static constexpr bool ROOT_V = false, ROOT_X = false, X_SIGNED = false;
    static constexpr bool G = true, SUMS = false, SQUARES = false, P = true, W_P = true;
    static constexpr bool V = false, M = false, X = false, W_V = false, W_M = false, W_X = false;
    static constexpr bool Y = false, SLICED = false, FADES_V = false, FADES_M = false;
};

// AdamW, Adam and RAdam; LAMB and StableAdamW, whose decay and rate are found first; Adam-mini, whose second moment was
// written before as a FACTORED one's is. MAX: amsgrad's largest second moment. CODED: on a format that codes.
template <bool FACTORED, bool MAX, bool CODED = false>
struct Adam : Reads {
    static constexpr bool V = true, M = true, X = MAX, W_V = !FACTORED, W_M = true, W_X = MAX;
    static constexpr bool FADES_V = CODED && !FACTORED, FADES_M = CODED;
    INLINE vf apply(vf& p, vf g, vf& v, vf& m, vf& x, const Scalars& s) {
        p = p * s.decay;
        g = with_decay(g, p, s);
        m = FADES_M ? fma(g, splat(s.first.weight), m) : lerp(m, g, s.first);
        if (FADES_V) v = fma(s.one_minus_beta2 * g, g, v);
        else if (!FACTORED) v = second_moment(v, g, s);
        vf largest = v;
        if (MAX) largest = x = (v > x) | (v != v) ? v : x;
        // Not fused into one: torch rounds the decayed parameter, and is followed to 1e-6 over a hundred steps.
        vf update = m * s.rate;
        const vf size = fma(root(largest), splat(s.inverse_bias), splat(s.eps));
        if (!s.plain) update = bounded<FACTORED>(CODED ? quotient(update, size) : update / size, s);
        p = p + update;
        return vf{};
    }
};

template <bool FACTORED>
struct Adabound : Reads {
    static constexpr bool V = true, M = true, W_V = !FACTORED, W_M = true;
    INLINE vf apply(vf& p, vf g, vf& v, vf& m, vf&, const Scalars& s) {
        g = with_decay(g, p, s);
        m = lerp(m, g, s.first);
        if (!FACTORED) v = second_moment(v, g, s);
        const vf rate = s.rate / (root(v) + s.eps);
        p = p - at_most(at_least(rate, s.lowest), s.highest) * m;
        return vf{};
    }
};

template <bool FACTORED>
struct Ademamix : Reads {
    static constexpr bool V = true, M = true, X = true, X_SIGNED = true, W_V = !FACTORED, W_M = true, W_X = true;
    INLINE vf apply(vf& p, vf g, vf& v, vf& m, vf& x, const Scalars& s) {
        p = p * s.decay;
        m = lerp(m, g, s.first);
        x = lerp(x, g, s.third);
        if (!FACTORED) v = second_moment(v, g, s);
        const vf mean = fma(x, splat(s.mixed), m * s.first_bias);
        p = p + bounded<FACTORED>(mean * s.rate / fma(root(v), splat(s.inverse_bias), splat(s.eps)), s);
        return vf{};
    }
};

template <bool FACTORED>
struct Lion : Reads {
    static constexpr bool M = true, W_M = true;
    INLINE vf apply(vf& p, vf g, vf&, vf& m, vf&, const Scalars& s) {
        const vf c = lerp(m, g, s.first);
        const vf step = c > 0.0f ? splat(s.lr) : c < 0.0f ? splat(-s.lr) : vf{};
        p = p * s.decay - step;
        m = lerp(m, g, s.second);
        return vf{};
    }
};

template <bool FACTORED, bool MOMENTUM>
struct Sgd : Reads {
    static constexpr bool M = MOMENTUM, W_M = MOMENTUM;
    INLINE vf apply(vf& p, vf g, vf&, vf& m, vf&, const Scalars& s) {
        g = with_decay(g, p, s);
        if (MOMENTUM) {
            m = fma(g, splat(s.dampening), m * s.kept);
            g = s.nesterov ? fma(m, splat(s.momentum), g) : m;
        }
        p = fma(g, splat(-s.lr), p);
        return vf{};
    }
};

// Muon before its products, which are torch's: p is the update that they are taken of.
struct MuonUpdate : Reads {
    static constexpr bool M = true, W_M = true;
    INLINE vf apply(vf& p, vf g, vf&, vf& m, vf&, const Scalars& s) {
        m = lerp(m, g, s.first);
        p = s.nesterov ? lerp(g, m, s.second) : m;
        return vf{};
    }
};

// And behind them: g is what they made of it.
struct MuonApply : Reads {
    INLINE vf apply(vf& p, vf g, vf&, vf&, vf&, const Scalars& s) {
        p = fma(g, splat(s.rate), p * s.decay);
        return vf{};
    }
};

template <bool FACTORED, bool MOMENTUM, bool CENTERED>
struct Rmsprop : Reads {
    static constexpr bool V = true, M = MOMENTUM, X = CENTERED, W_V = !FACTORED, W_M = MOMENTUM, W_X = CENTERED;
    INLINE vf apply(vf& p, vf g, vf& v, vf& m, vf& x, const Scalars& s) {
        g = with_decay(g, p, s);
        if (!FACTORED) v = second_moment(v, g, s);
        vf variance = v;
        if (CENTERED) {
            x = lerp(x, g, s.second);
            variance = at_least(fma(-x, x, v), 0.0f);
        }
        const vf denominator = root(variance) + s.eps;
        if (MOMENTUM) {
            m = m * s.momentum + g / denominator;
            p = fma(m, splat(-s.lr), p);
        } else {
            p = p + g * -s.lr / denominator;
        }
        return vf{};
    }
};

// Adafactor's and CAME's second moment and update before it is clipped.
template <bool FACTORED>
INLINE vf raw_update(vf g, vf& v, const Scalars& s) {
    if (FACTORED) return g * at_most(v, s.ceiling);
    v = lerp(v, g * g + s.eps_added, s.second);
    return g * inverse_root(at_least(v, s.floor));
}

template <bool FACTORED, bool MOMENTUM>
struct Adafactor : Reads {
    static constexpr bool ROOT_V = FACTORED, V = true, M = MOMENTUM, W_V = !FACTORED, W_M = MOMENTUM;
    INLINE vf apply(vf& p, vf g, vf& v, vf& m, vf&, const Scalars& s) {
        vf u = raw_update<FACTORED>(g, v, s) * s.update_scale;
        if (MOMENTUM) u = m = lerp(m, u, s.first);
        p = p * s.decay;
        if (s.shrink != 0.0f) p = p - p * s.shrink;
        p = p - u;
        return vf{};
    }
};

// RESIDUAL is for matrices; of a factored state it is that of this step, which MeansResidual has averaged.
template <bool FACTORED, bool RESIDUAL>
struct Came : Reads {
    static constexpr bool ROOT_V = FACTORED, ROOT_X = FACTORED, V = true, M = true, X = RESIDUAL;
    static constexpr bool W_V = !FACTORED, W_M = true, W_X = !FACTORED && RESIDUAL;
    INLINE vf apply(vf& p, vf g, vf& v, vf& m, vf& x, const Scalars& s) {
        const vf u = raw_update<FACTORED>(g, v, s) * s.update_scale;
        m = lerp(m, u, s.first);
        if (RESIDUAL && !FACTORED) x = lerp(x, (u - m) * (u - m) + s.eps_residual, s.third);
        const vf step = !RESIDUAL ? m : FACTORED ? m * x : m * inverse_root(x);
        p = fma(step, splat(-s.lr), p * s.decay);
        return vf{};
    }
};

// CAME's step where the first moment of this step is there already.
struct CameWritten : Reads {
    static constexpr bool ROOT_X = true, G = false, M = true, X = true;
    INLINE vf apply(vf& p, vf, vf&, vf& m, vf& x, const Scalars& s) {
        p = fma(m * x, splat(-s.lr), p * s.decay);
        return vf{};
    }
};

struct SumParameter : Reads {
    static constexpr bool G = false, SQUARES = true, W_P = false;
    INLINE vf apply(vf&, vf, vf&, vf&, vf&, const Scalars&) { return vf{}; }
};

struct SumGradient : Reads {
    static constexpr bool SUMS = true, P = false, W_P = false;
    INLINE vf apply(vf&, vf g, vf&, vf&, vf&, const Scalars&) { return g * g; }
};

// LAMB's update, for its size and the parameter's.
template <bool FACTORED>
struct SumLamb : Reads {
    static constexpr bool SUMS = true, SQUARES = true, W_P = false, V = true, M = true;
    INLINE vf apply(vf& p, vf g, vf& v, vf& m, vf&, const Scalars& s) {
        m = lerp(m, g, s.first);
        if (!FACTORED) v = second_moment(v, g, s);
        const vf u = m * s.rate / fma(root(v), splat(s.inverse_bias), splat(s.eps));
        p = fma(p, splat(s.shrink), u);
        return p * p;
    }
};

// What StableAdamW clips by: the gradient as a multiple of what the second moment says. Of its square, without a root:
// the squared gradient as the second moment is given it, over that moment; whole.cpp puts the factors beside the sum.
template <bool FACTORED>
struct SumSurprise : Reads {
    static constexpr bool SUMS = true, P = false, W_P = false, V = true;
    INLINE vf apply(vf&, vf g, vf& v, vf&, vf&, const Scalars& s) {
        if (!FACTORED) v = second_moment(v, g, s);
        return s.one_minus_beta2 * g * g / at_least(v, s.floor);
    }
};

// Adafactor's and CAME's update, for its size; WITH_P: and the parameter's.
template <bool FACTORED, bool WITH_P>
struct SumUpdate : Reads {
    static constexpr bool ROOT_V = FACTORED, SUMS = true, SQUARES = WITH_P, P = WITH_P, W_P = false, V = true;
    INLINE vf apply(vf&, vf g, vf& v, vf&, vf&, const Scalars& s) {
        const vf u = raw_update<FACTORED>(g, v, s);
        return u * u;
    }
};

// What a factored moment is renewed by: `put` adds it to the sums of its row and column.
struct MeansAdam : Reads {
    static constexpr bool W_P = false, V = true, W_V = true;
    INLINE vf apply(vf& p, vf g, vf& v, vf&, vf&, const Scalars& s) {
        g = with_decay(g, p * s.decay, s);
        v = g * g;
        return vf{};
    }
};
struct MeansRmsprop : Reads {
    static constexpr bool W_P = false, V = true, W_V = true;
    INLINE vf apply(vf& p, vf g, vf& v, vf&, vf&, const Scalars& s) {
        g = with_decay(g, p, s);
        v = g * g;
        return vf{};
    }
};
struct MeansAdafactor : Reads {
    static constexpr bool P = false, W_P = false, V = true, W_V = true;
    INLINE vf apply(vf&, vf g, vf& v, vf&, vf&, const Scalars& s) {
        v = g * g + s.eps_added;
        return vf{};
    }
};
// The squares of an update but for the means of the columns, which are not known yet.
struct ColumnsOfUpdate : Reads {
    static constexpr bool P = false, W_P = false, V = true, W_V = true;
    INLINE vf apply(vf&, vf g, vf& v, vf&, vf&, const Scalars&) {
        const vf u = g * v;
        v = u * u;
        return vf{};
    }
};
// WRITES: the first moment, in fp32, which the step then need not find again.
template <bool WRITES>
struct MeansResidual : Reads {
    static constexpr bool ROOT_V = true, P = false, W_P = false, V = true, M = true, X = true, W_M = WRITES, W_X = true;
    INLINE vf apply(vf&, vf g, vf& v, vf& m, vf& x, const Scalars& s) {
        const vf u = raw_update<true>(g, v, s) * s.update_scale;
        m = lerp(m, u, s.first);
        x = (u - m) * (u - m) + s.eps_residual;
        return vf{};
    }
};

}  // namespace
