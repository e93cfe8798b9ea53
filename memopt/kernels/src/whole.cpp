// The passes of Adafactor, CAME, LAMB, StableAdamW, Adam-mini and of every rule with a factored moment. What is summed is summed over pieces that
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

// A piece, the task of one thread: this many chunks, as rows of at most BLOCK chunks of columns, 16 rows at least. What
// a thread keeps for a piece of a factored moment is bounded by that, however wide the tensor.
constexpr int64_t PIECE = 64, BLOCK = 16, FEWEST_ROWS = 16;

struct Totals {
    double rule, squares;
};

struct Sweep {
    const Table& table;
    const Tensor& t;
    const Scalars& s;
    const uint32_t* keys;
    Pass pass;
    Means means;
    const float* const* each;  // of a stack in the view of the other moments: the means of its matrices, by slot; or null
    bool backward;
    int64_t per_row, wide, height, across, pieces;  // of a tensor: chunks per row; of a piece: chunks, rows; pieces per row
    Totals* totals;                                 // per piece; null where nothing is summed
};

void sweep_piece(void* context, int64_t task) {
    const Sweep& w = *static_cast<Sweep*>(context);
    const Tensor& t = w.t;
    const int64_t piece = w.backward ? w.pieces - 1 - task : task;
    const Run run = w.table.run[w.pass][t.format];
    const int64_t k0 = piece % w.across * w.wide, k1 = k0 + w.wide < w.per_row ? k0 + w.wide : w.per_row;
    const int64_t r0 = piece / w.across * w.height, r1 = r0 + w.height < t.rows ? r0 + w.height : t.rows;
    const int64_t first = k0 * CHUNK, end = k1 * CHUNK < t.cols ? k1 * CHUNK : t.cols;
    const int64_t matrix_rows = t.format == FMT_FACTORED ? t.height : t.rows;
    alignas(64) float roots[SLOTS * BLOCK * CHUNK];
    Sums sums{};
    // A piece is cut where a matrix ends, because a factored moment is divided by its matrix's mean.
    for (int64_t row = r0, stop; row < r1; row = stop) {
        const int64_t matrix = row / matrix_rows;
        stop = (matrix + 1) * matrix_rows < r1 ? (matrix + 1) * matrix_rows : r1;
        if (w.each)
            for (int slot = 0; slot < SLOTS; slot++) sums.means[slot] = w.each[slot];
        else w.means.set(w.table, t, matrix, first, end - first, sums, roots);
        if (w.across == 1) run(t, w.s, w.keys, row * w.per_row, stop * w.per_row, sums);
        else
            for (int64_t r = row; r < stop; r++) run(t, w.s, w.keys, r * w.per_row + k0, r * w.per_row + k1, sums);
    }
    if (w.totals) w.totals[piece] = {sums.total, sums.squares};
}

// Returns the sums of what the pass adds, 0 if it adds nothing.
Totals sweep(const Table& table, const Tensor& t, const Scalars& s, const uint32_t* keys, Pass pass, const Means& means,
             const float* const* each, bool summed, bool backward, int threads) {
    Sweep job{table, t, s, keys, pass, means, each, backward, chunks_of(t.cols), 0, 0, 0, 0, nullptr};
    job.wide = job.per_row < BLOCK ? job.per_row : BLOCK;
    job.height = PIECE / job.wide < FEWEST_ROWS ? FEWEST_ROWS : PIECE / job.wide;
    job.across = (job.per_row + job.wide - 1) / job.wide;
    job.pieces = job.across * ((t.rows + job.height - 1) / job.height);
    Totals few[16];
    if (summed) job.totals = job.pieces <= 16 ? few : static_cast<Totals*>(std::malloc(job.pieces * sizeof(Totals)));
    if (summed && !job.totals) std::abort();  // 16 bytes per 65536 elements
    parallel(threads, job.pieces, sweep_piece, &job);
    Totals total{};
    for (int64_t i = 0; summed && i < job.pieces; i++)
        total.rule += job.totals[i].rule, total.squares += job.totals[i].squares;
    if (job.totals != few) std::free(job.totals);
    return total;
}

}  // namespace

bool whole_step(const Table& table, const Group& h, const Tensor& t, const Prepared& ready, int threads, Total total) {
    Scalars s = *ready.scalars;
    const bool factored = is_factored(t.format);
    Tensor lines = t;  // as the matrices lie, which is how their means are found
    if (factored && t.format != FMT_FACTORED) {
        lines.cols = t.span;
        lines.rows = t.span ? t.numel / t.span : 0;
    }
    // Blocks of a stack's other moments run over lines and matrices: then every element's line is looked up.
    const bool spread = lines.cols != t.cols;
    const int64_t matrices = spread && t.height ? lines.rows / t.height : 0;
    float* const storage = spread ? static_cast<float*>(std::malloc(SLOTS * (matrices + 1) * sizeof(float))) : nullptr;
    if (spread && !storage) std::abort();  // 12 bytes for each matrix
    const float* each[SLOTS] = {};
    Means means(TINY);
    bool going = true;  // until a sum over ranks fails
    // Every pass begins where the one before has ended, whose memory is in the cache.
    bool backward = true;
    const auto pass = [&](Pass which, bool summed = false) {
        backward = !backward;
        const float* const* of_each = spread ? each : nullptr;
        return going ? sweep(table, t, s, ready.keys, which, means, of_each, summed, backward, threads) : Totals{};
    };
    // The new means of a factored moment; what reads them afterwards divides by a mean bounded by `floor`.
    const auto renew = [&](Pass which, int slot, double keep, double take, double floor = TINY) {
        means.floor[slot] = static_cast<float>(TINY);
        means.prepare(lines, slot);
        means.renewed = slot;
        const Change change{which, slot, keep, take};
        going = going && renew_means(table, lines, s, ready.keys, change, means, threads, total);
        means.renewed = -1;
        backward = false;
        means.floor[slot] = static_cast<float>(floor);
        means.prepare(lines, slot);
        if (spread) {
            float* const out = storage + slot * (matrices + 1);
            means.of_each(lines, slot, out);
            each[slot] = out;
        }
    };
    // Without a decay in the gradient the parameter is not read, and the squares are those that Adafactor averages.
    const auto renew_adam = [&](Pass coupled = MEANS_ADAM) {
        renew(s.coupled ? coupled : MEANS_ADAFACTOR, 0, s.beta2, s.one_minus_beta2);
    };
    const auto root_mean_square = [&](double squares) {
        if (total && going) going = total(&squares, 1) == 0;
        return static_cast<double>(static_cast<float>(std::sqrt(squares / static_cast<double>(t.whole_numel))));
    };
    const auto clip = [&](Pass which) {
        const double rms = root_mean_square(pass(which, true).rule);
        return rms / h.d < 1 ? 1.0 : rms / h.d;  // a NaN stays
    };
    switch (h.rule) {
        case ADAM:
        case RADAM:
            renew_adam();
            pass(STEP_ADAM);
            break;
        case RMSPROP:
            renew_adam(MEANS_RMSPROP);
            pass(h.flags & MOMENTUM ? STEP_RMSPROP_MOMENTUM : STEP_RMSPROP);
            break;
        case ADAFACTOR: {
            double rate = adafactor_rate(h, static_cast<double>(ready.step));
            if (h.flags & SCALE_PARAMETER) {
                const double rms = root_mean_square(pass(SUM_PARAMETER, true).squares);
                rate *= rms < h.eps2 ? h.eps2 : rms;
            }
            if (factored) renew(MEANS_ADAFACTOR, 0, 1.0 - s.second.weight, s.second.weight, s.mean_floor);
            s.update_scale = static_cast<float>(rate / clip(SUM_UPDATE));
            if (h.flags & TRANSFORMERS) s.shrink = static_cast<float>(h.weight_decay * rate);
            pass(h.flags & MOMENTUM ? STEP_ADAFACTOR_MOMENTUM : STEP_ADAFACTOR);
            break;
        }
        case CAME: {
            if (factored) renew(MEANS_ADAFACTOR, 0, 1.0 - s.second.weight, s.second.weight);
            s.update_scale = static_cast<float>(1 / clip(SUM_UPDATE));
            if (factored) renew(MEANS_RESIDUAL, 2, 1.0 - s.third.weight, s.third.weight);
            pass(t.data[2] ? STEP_CAME : STEP_CAME_VECTOR);
            break;
        }
        case ADABOUND:
        case ADEMAMIX:
            renew_adam();
            pass(h.rule == ADABOUND ? STEP_ADABOUND : STEP_ADEMAMIX);
            break;
        case ADAMMINI:
            renew_row_means(table, t, h.beta2, s, threads);
            backward = false;
            pass(STEP_ADAMMINI);
            break;
        case LAMB: {
            if (factored) renew_adam();
            const double rate = -h.lr * s.rate;
            const Totals sums = pass(SUM_LAMB, true);
            const double size = root_mean_square(sums.squares), step = root_mean_square(sums.rule);
            const double trust = size > 0 && step > 0 ? size / step : 1;
            s.rate = static_cast<float>(rate * trust);
            s.decay = static_cast<float>(1 - h.lr * trust * h.weight_decay);
            pass(STEP_ADAM);
            break;
        }
        case STABLEADAMW: {
            if (factored) renew_adam();
            const double clipped = clip(SUM_SURPRISE);
            s.rate = static_cast<float>(s.rate / clipped);
            s.decay = static_cast<float>(1 - h.lr / clipped * h.weight_decay);
            pass(STEP_ADAM);
            break;
        }
        default:
            break;
    }
    std::free(storage);
    return going;
}

}  // namespace memopt
