// From hyperparameters and the number of the step to the numbers that the loops use: what memopt/rules compute in
// Python floats, in the same order.
#pragma once
#include <cmath>
#include "table.h"

namespace memopt {

constexpr double TINY = 0x1p-126;  // memopt/formats/factored.py

inline Lerp make_lerp(double weight) {
    const float w = static_cast<float>(weight);
    return {w, !(std::fabs(w) < 0.5f)};
}

inline double radam_factor(double t, double beta2) {
    const double rho_inf = 2 / (1 - beta2) - 1, power = std::pow(beta2, t);
    const double rho = rho_inf - 2 * t * power / (1 - power);
    if (rho <= 5) return -1;
    return std::sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho));
}

// AdEMAMix's b3, whose half-life rises in a line from that of b1.
inline double slow_beta(const Group& h, double t) {
    if (!(h.beta3_steps > 0) || !(h.beta3 > 0)) return h.beta3;
    const double x = std::fmin(t / h.beta3_steps, 1), ratio = h.beta1 > 0 ? std::log(h.beta3) / std::log(h.beta1) : 0;
    return std::fmin(std::exp(std::log(h.beta3) / ((1 - x) * ratio + x)), h.beta3);
}

inline double adafactor_rate(const Group& h, double t) {
    const double relative = 1 / std::sqrt(t);
    if (!(h.flags & TRANSFORMERS)) return std::fmin(h.lr, relative);
    if (h.flags & RELATIVE_STEP) return std::fmin(h.flags & WARMUP_INIT ? 1e-6 * t : 1e-2, relative);
    return h.lr;
}

inline Scalars make_scalars(const Group& h, int64_t step) {
    Scalars s{};
    const double t = static_cast<double>(step);
    s.gradient_sign = h.flags & MAXIMIZE ? 0x80000000u : 0;
    s.gradient_scale = static_cast<float>(h.gradient_scale);
    s.scaled = s.gradient_scale != 1;
    s.decay = 1;
    s.lr = static_cast<float>(h.lr);
    s.update_scale = 1;
    s.mean_floor = TINY;
    s.floor = -1;
    s.ceiling = INFINITY;
    s.longest = INFINITY;
    const double longest = h.lr * std::fmax(1, (1 - h.beta1) / std::sqrt(1 - h.beta2));
    if (h.flags & DECOUPLED) s.decay = static_cast<float>(1 - h.lr * h.weight_decay);
    else if (h.rule != ADAFACTOR) s.l2 = static_cast<float>(h.weight_decay), s.coupled = s.l2 != 0;
    s.first = make_lerp(1 - h.beta1);
    s.second = make_lerp(1 - h.beta2);
    s.third = make_lerp(1 - h.beta3);
    s.beta2 = static_cast<float>(h.beta2);
    s.one_minus_beta2 = static_cast<float>(1 - h.beta2);
    s.eps = static_cast<float>(h.eps);
    s.momentum = s.kept = static_cast<float>(h.momentum);
    if (h.slow_steps > 0) {
        s.begins = step == 1;
        s.returns = step % static_cast<int64_t>(h.slow_steps) == 0;
        s.slow = make_lerp(h.slow_rate);
    }
    switch (h.rule) {
        case ADAM:
            s.longest = static_cast<float>(longest);
            [[fallthrough]];
        case ADAMMINI:
        case STABLEADAMW:
            s.inverse_bias = static_cast<float>(1 / std::sqrt(1 - std::pow(h.beta2, t)));
            s.rate = static_cast<float>(-h.lr / (1 - std::pow(h.beta1, t)));
            // Of the second moment as it is kept, where its root without bias is eps.
            if (h.rule == STABLEADAMW) s.floor = static_cast<float>(std::fmax(h.eps * h.eps * (1 - std::pow(h.beta2, t)), TINY));
            break;
        case RADAM: {
            const double factor = radam_factor(t, h.beta2), scale = -h.lr / (1 - std::pow(h.beta1, t));
            s.plain = factor < 0;
            s.inverse_bias = 1;
            s.longest = static_cast<float>(longest * factor);
            s.rate = static_cast<float>(s.plain ? scale : scale * factor * std::sqrt(1 - std::pow(h.beta2, t)));
            break;
        }
        case SGD:
            s.dampening = static_cast<float>(step == 1 ? 1 : 1 - h.dampening);
            s.nesterov = h.flags & NESTEROV;
            if (step == 1) s.kept = 0;
            break;
        case MUON:
            s.first = make_lerp(1 - h.momentum);
            s.second = make_lerp(h.momentum);
            s.nesterov = h.flags & NESTEROV;
            s.rate = static_cast<float>(-(h.lr * h.d));
            break;
        case ADAFACTOR: {
            s.second = make_lerp(std::pow(t, h.beta2));  // beta2 holds beta2_decay
            const bool torch_way = !(h.flags & TRANSFORMERS);
            if (torch_way) {
                s.decay = static_cast<float>(1 - h.lr * h.weight_decay);
                s.floor = static_cast<float>(h.eps * h.eps);
                s.ceiling = static_cast<float>(1 / h.eps);
                s.mean_floor = std::fmax(h.eps, TINY);
            } else {
                s.eps_added = s.eps;
            }
            break;
        }
        case CAME:
            s.eps_added = s.eps;
            s.eps_residual = static_cast<float>(h.eps2);
            break;
        case LAMB:
            s.inverse_bias = static_cast<float>(1 / std::sqrt(1 - std::pow(h.beta2, t)));
            s.rate = static_cast<float>(1 / (1 - std::pow(h.beta1, t)));
            s.shrink = static_cast<float>(h.weight_decay);
            break;
        case ADABOUND: {
            const double size = h.lr * std::sqrt(1 - std::pow(h.beta2, t)) / (1 - std::pow(h.beta1, t));
            const double last = h.final_lr * (h.peak > 0 ? h.lr / h.peak : 1);
            s.rate = static_cast<float>(size);
            s.lowest = static_cast<float>(last * (1 - 1 / (h.gamma * t + 1)));
            s.highest = static_cast<float>(last * (1 + 1 / (h.gamma * t)));
            break;
        }
        case ADEMAMIX:
            s.inverse_bias = static_cast<float>(1 / std::sqrt(1 - std::pow(h.beta2, t)));
            s.first_bias = static_cast<float>(1 / (1 - std::pow(h.beta1, t)));
            s.mixed = static_cast<float>(h.alpha * (h.alpha_steps > 0 ? std::fmin(t / h.alpha_steps, 1) : 1));
            s.third = make_lerp(1 - slow_beta(h, t));
            s.longest = static_cast<float>(longest + h.lr * h.alpha * (h.alpha_steps > 0 ? std::fmin(t / h.alpha_steps, 1) : 1));
            s.rate = static_cast<float>(-h.lr);
            break;
        case PRODIGY: {
            const double a = h.lr * h.d * (h.corrected > 0 ? std::sqrt(1 - std::pow(h.beta2, t)) / (1 - std::pow(h.beta1, t)) : 1);
            const double weight = h.d / h.d0;
            s.decay = 1;
            if (h.flags & DECOUPLED) s.shrink = static_cast<float>(a * h.weight_decay);
            s.lr = static_cast<float>(a);
            s.longest = static_cast<float>(a * std::fmax(1, (1 - h.beta1) / std::sqrt(1 - h.beta2)));
            s.kept = static_cast<float>(h.beta1);
            s.dampening = static_cast<float>(h.d * (1 - h.beta1));
            s.one_minus_beta2 = static_cast<float>(h.d * h.d * (1 - h.beta2));
            s.eps = static_cast<float>(h.d * h.eps);
            s.mixed = static_cast<float>(h.beta3);
            s.first_bias = static_cast<float>(weight * (h.safeguard > 0 ? h.d : a));
            s.toward = weight * a;
            break;
        }
        default:
            break;
    }
    return s;
}

}  // namespace memopt
