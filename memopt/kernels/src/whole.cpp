// The passes of Adafactor, CAME and of every rule with a factored moment. What is summed is summed over pieces that
// depend on the shape only and the pieces are added in order, so that the bits do not depend on the number of threads.
#include "whole.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "means.h"
#include "pool.h"
#include "scalars.h"

namespace memopt {
namespace {

constexpr int64_t PIECE = 64, PIECE_ROWS = 16;  // chunks of one task, at least; rows of a factored moment

int64_t piece_of(const Tensor& t) {
    const int64_t rows = t.format == FMT_FACTORED ? PIECE_ROWS * chunks_of(t.cols) : 0;
    return rows > PIECE ? rows : PIECE;
}

// One pass over all chunks of a tensor, cut into pieces; a piece is cut again where a matrix ends, because a factored
// moment is divided by its matrix's mean.
struct Sweep {
    const Table& table;
    const Tensor& t;
    const Scalars& s;
    const uint32_t* keys;
    Pass pass;
    Means means;
    double* totals;  // per piece; null where nothing is summed
};

void sweep_piece(void* context, int64_t piece) {
    const Sweep& w = *static_cast<Sweep*>(context);
    const int64_t per_row = chunks_of(w.t.cols), chunks = w.t.rows * per_row;
    const int64_t size = piece_of(w.t);
    int64_t first = piece * size;
    const int64_t last = first + size < chunks ? first + size : chunks;
    const Run run = w.table.run[w.pass][w.t.format];
    const int64_t per_matrix = w.t.format == FMT_FACTORED ? w.t.height * per_row : chunks;
    Sums sums{};
    float few[3 * CHUNK];
    float* roots = few;
    if (roots_size(w.t) > 3 * CHUNK) roots = static_cast<float*>(std::malloc(roots_size(w.t) * sizeof(float)));
    if (!roots) std::abort();
    while (first < last) {
        const int64_t matrix = first / per_matrix, end = (matrix + 1) * per_matrix;
        const int64_t stop = end < last ? end : last;
        w.means.set(w.table, w.t, matrix, sums, roots);
        run(w.t, w.s, w.keys, first, stop, sums);
        first = stop;
    }
    if (roots != few) std::free(roots);
    if (w.totals) w.totals[piece] = sums.total;
}

// Returns the sum of what the pass adds, 0 if it adds nothing.
double sweep(const Table& table, const Tensor& t, const Scalars& s, const uint32_t* keys, Pass pass, const Means& means,
             bool summed, int threads) {
    const int64_t size = piece_of(t), pieces = (t.rows * chunks_of(t.cols) + size - 1) / size;
    double few[16];
    double* totals = nullptr;
    if (summed) totals = pieces <= 16 ? few : static_cast<double*>(std::malloc(pieces * sizeof(double)));
    if (summed && !totals) std::abort();  // a few bytes per 65536 elements
    Sweep job{table, t, s, keys, pass, means, totals};
    parallel(threads, pieces, sweep_piece, &job);
    double total = 0;
    for (int64_t i = 0; summed && i < pieces; i++) total += totals[i];
    if (totals != few) std::free(totals);
    return total;
}

double root_mean_square(double squares, const Tensor& t) {
    return static_cast<float>(std::sqrt(squares / static_cast<double>(t.numel)));
}

}  // namespace

void whole_step(const Table& table, const Group& h, const Tensor& t, const Prepared& ready, int threads) {
    Scalars s = *ready.scalars;
    const bool factored = t.format == FMT_FACTORED;
    Means means(TINY);
    const auto pass = [&](Pass which, bool summed = false) {
        return sweep(table, t, s, ready.keys, which, means, summed, threads);
    };
    // The new means of a factored moment; what reads them afterwards divides by a mean bounded by `floor`.
    const auto renew = [&](Pass which, int slot, double floor) {
        means.floor[slot] = static_cast<float>(TINY);
        means.prepare(t, slot);
        means.renewed = slot;
        renew_means(table, t, s, ready.keys, which, slot, means, threads);
        means.renewed = -1;
        means.floor[slot] = static_cast<float>(floor);
        means.prepare(t, slot);
    };
    const auto clip = [&] {
        const double rms = root_mean_square(pass(SUM_UPDATE, true), t);
        return rms / h.d < 1 ? 1.0 : rms / h.d;  // a NaN stays
    };
    switch (h.rule) {
        case ADAM:
        case RADAM:
            renew(MEANS_ADAM, 0, TINY);
            pass(STEP_ADAM);
            break;
        case RMSPROP:
            renew(MEANS_RMSPROP, 0, TINY);
            pass(h.flags & MOMENTUM ? STEP_RMSPROP_MOMENTUM : STEP_RMSPROP);
            break;
        case ADAFACTOR: {
            double rate = adafactor_rate(h, static_cast<double>(ready.step));
            if (h.flags & SCALE_PARAMETER) {
                const double rms = root_mean_square(pass(SUM_PARAMETER, true), t);
                rate *= rms < h.eps2 ? h.eps2 : rms;
            }
            if (factored) renew(MEANS_ADAFACTOR, 0, s.mean_floor);
            s.update_scale = static_cast<float>(rate / clip());
            if (h.flags & TRANSFORMERS) s.shrink = static_cast<float>(h.weight_decay * rate);
            pass(h.flags & MOMENTUM ? STEP_ADAFACTOR_MOMENTUM : STEP_ADAFACTOR);
            break;
        }
        case CAME: {
            if (factored) renew(MEANS_ADAFACTOR, 0, TINY);
            s.update_scale = static_cast<float>(1 / clip());
            if (factored) renew(MEANS_RESIDUAL, 2, TINY);
            pass(t.data[2] ? STEP_CAME : STEP_CAME_VECTOR);
            break;
        }
        default:
            break;
    }
}

}  // namespace memopt
