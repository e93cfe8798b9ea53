// The passes of Adafactor, CAME, LAMB, StableAdamW, Adam-mini and of every rule with a factored moment. What is summed is summed over pieces that
// depend on the shape only and the pieces are added in order, so that the bits do not depend on the number of threads.
#include "passes/whole.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "passes/means.h"
#include "pool.h"
#include "scalars.h"

namespace memopt {
namespace {

// A piece, the task of one thread: this many chunks, as rows of at most BLOCK chunks of columns, 16 rows at least. What
// a thread keeps for a piece of a factored moment is bounded by that, however wide the tensor.
constexpr int64_t PIECE = 64, BLOCK = 16, FEWEST_ROWS = 16;
constexpr int64_t ROOT_COLS = 1 << 14;  // 64 KiB of roots of a moment

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

// As the matrices of a factored moment lie, which is how their means are found.
Tensor lines_of(const Tensor& t) {
    Tensor lines = t;
    if (is_factored(t.format) && t.format != FMT_FACTORED) {
        lines.cols = t.span;
        lines.rows = t.span ? t.numel / t.span : 0;
    }
    return lines;
}

// How a factored second moment is renewed. Without a decay in the gradient the parameter is not read, and the squares
// are those that Adafactor averages.
Change second_moment(const Group& h, const Scalars& s) {
    if (h.rule == ADAFACTOR || h.rule == CAME) return {MEANS_ADAFACTOR, 0, 1.0 - s.second.weight, s.second.weight};
    const Pass pass = !s.coupled ? MEANS_ADAFACTOR : h.rule == RMSPROP ? MEANS_RMSPROP : MEANS_ADAM;
    return {pass, 0, s.beta2, s.one_minus_beta2};
}

// Whether the squares of the updates are found with the means of the second moment.
bool finds_updates(const Group& h, const Tensor& lines) { return h.rule == CAME && updates_with_means(lines); }

// The sums that a step begins with where no moment is factored; PASSES where there are none.
Pass first_sums(const Group& h) {
    switch (h.rule) {
        case ADAFACTOR: return h.flags & SCALE_PARAMETER ? SUM_UPDATE_PARAMETER : SUM_UPDATE;
        case CAME: return SUM_UPDATE;
        case LAMB: return SUM_LAMB;
        case STABLEADAMW: return SUM_SURPRISE;
        default: return PASSES;
    }
}

struct Count {
    int64_t rows, cols;  // numbers
};

// Means of the second moment that the first pass of a step writes.
Count means_of(const Group& h, const Tensor& t) {
    if (h.rule == ADAMMINI) return {(t.numel + t.span - 1) / t.span, 0};
    if (!is_factored(t.format) || !t.span || !t.height) return {0, 0};
    return {t.numel / t.span, t.numel / t.span / t.height * t.span};
}

}  // namespace

int64_t floats_to_keep(const Group& h, const Tensor& t) {
    if (h.rule == SINKGD) return sinkgd_scales(t);
    const Count count = means_of(h, t);
    return count.rows + count.cols;
}

bool shows_what_is_not_finite(const Group& h, const Tensor& t) {
    return h.rule == SINKGD || means_of(h, t).rows || first_sums(h) != PASSES;
}

bool begin(const Table& table, const Group& h, const Tensor& t, const Prepared& ready, int threads, Begun& begun) {
    if (h.rule == SINKGD) return begin_sinkgd(table, h, t, ready, threads, begun);
    const Count count = means_of(h, t);
    if (!count.rows) {
        begun.sums = sweep(table, t, *ready.scalars, ready.keys, first_sums(h), Means(TINY), nullptr, true, false, threads);
        return std::isfinite(begun.sums.rule + begun.sums.squares);
    }
    float* const rows = static_cast<float*>(t.data[0]);
    std::memcpy(begun.before, rows, count.rows * sizeof(float));
    if (count.cols) std::memcpy(begun.before + count.rows, t.aux[0], count.cols * sizeof(float));
    begun.written = true;
    if (h.rule == ADAMMINI) {
        renew_row_means(table, t, h.beta2, *ready.scalars, threads);
    } else {
        const Tensor lines = lines_of(t);
        Means means(TINY);
        means.prepare(lines, 0);
        means.renewed = 0;
        renew_means(table, lines, *ready.scalars, ready.keys, second_moment(h, *ready.scalars), means, threads, nullptr,
                    finds_updates(h, lines) ? &begun.sums.rule : nullptr);
    }
    return table.all_finite(rows, count.rows, F32);  // every element is in the mean of a row
}

void undo(const Group& h, const Tensor& t, const Begun& begun) {
    if (!begun.written) return;
    const Count count = means_of(h, t);
    std::memcpy(t.data[0], begun.before, count.rows * sizeof(float));
    if (count.cols) std::memcpy(t.aux[0], begun.before + count.rows, count.cols * sizeof(float));
}

bool whole_step(const Table& table, const Group& h, const Tensor& t, const Prepared& ready, int threads, Total total,
                const Begun* begun) {
    if (h.rule == SINKGD) return step_sinkgd(table, h, t, ready, threads, total, begun);
    Scalars s = *ready.scalars;
    const bool factored = is_factored(t.format);
    const Tensor lines = lines_of(t);
    // Blocks of a stack's other moments run over lines and matrices: then every element's line is looked up.
    const bool spread = lines.cols != t.cols;
    const int64_t matrices = spread && t.height ? lines.rows / t.height : 0;
    float* const storage = spread ? static_cast<float*>(std::malloc(SLOTS * (matrices + 1) * sizeof(float))) : nullptr;
    if (spread && !storage) std::abort();  // 12 bytes for each matrix
    const float* each[SLOTS] = {};
    Means means(TINY);
    bool going = true;  // until a sum over ranks fails
    // Of one matrix with many more rows than threads the roots of its column means are found once and not for every piece.
    const bool once = factored && !spread && t.height == t.rows && t.height >= 64 * threads && t.cols <= ROOT_COLS;
    float* const roots = once ? static_cast<float*>(std::malloc(SLOTS * t.cols * sizeof(float))) : nullptr;
    // Every pass begins where the one before has ended, whose memory is in the cache.
    bool backward = true;
    const auto pass = [&](Pass which, bool summed = false) {
        backward = !backward;
        return going ? sweep(table, t, s, ready.keys, which, means, spread ? each : nullptr, summed, backward, threads) : Totals{};
    };
    const bool found_before = factored && !total && finds_updates(h, lines);
    Totals updates = begun ? begun->sums : Totals{};
    // The new means of a factored moment; what reads them afterwards divides by a mean bounded by `floor`.
    const auto renew = [&](const Change& change, double floor = TINY) {
        const int slot = change.slot;
        if (!begun || slot != 0) {
            means.floor[slot] = static_cast<float>(TINY);
            means.prepare(lines, slot);
            means.renewed = slot;
            going = going && renew_means(table, lines, s, ready.keys, change, means, threads, total,
                                         slot == 0 && found_before ? &updates.rule : nullptr);
            means.renewed = -1;
        }
        backward = false;
        means.floor[slot] = static_cast<float>(floor);
        means.prepare(lines, slot);
        if (roots) {
            table.inverse_roots(static_cast<const float*>(t.aux[slot]), roots + slot * t.cols, t.cols);
            means.ready[slot] = roots + slot * t.cols;
        }
        if (spread) {
            float* const out = storage + slot * (matrices + 1);
            means.of_each(lines, slot, out);
            each[slot] = out;
        }
    };
    const auto renew_second = [&](double floor = TINY) {
        if (factored) renew(second_moment(h, *ready.scalars), floor);
    };
    const auto sums = [&](Pass which) {
        return found_before || (begun && !factored) ? updates : pass(which, true);
    };
    const auto root_mean_square = [&](double squares) {
        if (total && going) going = total(&squares, 1) == 0;
        return static_cast<double>(static_cast<float>(std::sqrt(squares / static_cast<double>(t.whole_numel))));
    };
    if (begun) backward = false;  // the next pass is the second
    const auto clipped_by = [&](double squares) {
        const double rms = root_mean_square(squares);
        return rms / h.d < 1 ? 1.0 : rms / h.d;  // a NaN stays
    };
    switch (h.rule) {
        case ADAM: case RADAM: case ADABOUND: case ADEMAMIX:
            renew_second();
            pass(h.rule == ADABOUND ? STEP_ADABOUND : h.rule == ADEMAMIX ? STEP_ADEMAMIX : STEP_ADAM);
            break;
        case RMSPROP:
            renew_second();
            pass(h.flags & MOMENTUM ? STEP_RMSPROP_MOMENTUM : STEP_RMSPROP);
            break;
        case ADAFACTOR: {
            double rate = adafactor_rate(h, static_cast<double>(ready.step));
            const bool scaled = h.flags & SCALE_PARAMETER, apart = scaled && total;  // what ranks add up goes by the rule
            double squares = apart ? root_mean_square(pass(SUM_PARAMETER, true).squares) : 0;
            renew_second(s.mean_floor);
            const Totals found = sums(scaled && !apart ? SUM_UPDATE_PARAMETER : SUM_UPDATE);
            if (scaled) {
                const double rms = apart ? squares : root_mean_square(found.squares);
                rate *= rms < h.eps2 ? h.eps2 : rms;
            }
            s.update_scale = static_cast<float>(rate / clipped_by(found.rule));
            if (h.flags & TRANSFORMERS) s.shrink = static_cast<float>(h.weight_decay * rate);
            pass(h.flags & MOMENTUM ? STEP_ADAFACTOR_MOMENTUM : STEP_ADAFACTOR);
            break;
        }
        case CAME: {
            renew_second();
            s.update_scale = static_cast<float>(1 / clipped_by(sums(SUM_UPDATE).rule));
            // A first moment in fp32 is written where the residual is found: the step reads it instead of the gradient.
            const bool written = t.format == FMT_FACTORED;
            if (factored) renew({written ? MEANS_RESIDUAL_WRITING : MEANS_RESIDUAL, 2, 1.0 - s.third.weight, s.third.weight});
            pass(!t.data[2] ? STEP_CAME_VECTOR : written ? STEP_CAME_WRITTEN : STEP_CAME);
            break;
        }
        case ADAMMINI:
            if (!begun) renew_row_means(table, t, h.beta2, s, threads);
            backward = false;
            pass(STEP_ADAMMINI);
            break;
        case LAMB: {
            renew_second();
            const double rate = -h.lr * s.rate;
            const Totals found = sums(SUM_LAMB);
            const double size = root_mean_square(found.squares), step = root_mean_square(found.rule);
            const double trust = size > 0 && step > 0 ? size / step : 1;
            s.rate = static_cast<float>(rate * trust);
            s.decay = static_cast<float>(1 - h.lr * trust * h.weight_decay);
            pass(STEP_ADAM);
            break;
        }
        case STABLEADAMW: {
            renew_second();
            const double clipped = clipped_by(sums(SUM_SURPRISE).rule / (std::pow(s.inverse_bias, 2.0) * s.one_minus_beta2));
            s.rate = static_cast<float>(s.rate / clipped);
            s.decay = static_cast<float>(1 - h.lr / clipped * h.weight_decay);
            pass(STEP_ADAM);
            break;
        }
        case PRODIGY: {
            renew_second();
            const Totals found = pass(h.flags & SLICED_SUMS ? STEP_PRODIGY_SLICED : STEP_PRODIGY, true);
            t.reported[0] = s.toward * found.rule, t.reported[1] = found.squares;
            break;
        }
        default:
            break;
    }
    std::free(storage);
    std::free(roots);
    return going;
}

}  // namespace memopt
