// SinkGD: what the rows and columns of a matrix are multiplied by, each found with what the other has been found to be
// (memopt/rules/sinkgd.py). One iteration is one read of the gradient; nothing of its size is written but the parameter.
// A matrix is cut into bands of rows by its shape alone; columns are summed per band in fp64, and bands are added in order.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "pool.h"
#include "scalars.h"
#include "passes/whole.h"

namespace memopt {
namespace {

constexpr int64_t FEWEST_ROWS = 16, MAX_BANDS = 16;
constexpr int64_t PARTIAL_SUMS = 1 << 17;  // doubles of all bands: one MiB, or those of one band
constexpr int64_t PIECE = 64;              // chunks of one task of the update

int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// As its matrices lie, one below the other.
Tensor in_lines(const Tensor& t) {
    Tensor lines = t;
    lines.cols = t.span;
    lines.rows = t.span ? t.numel / t.span : 0;
    return lines;
}
int64_t matrices_of(const Tensor& lines) { return lines.stacked ? (lines.height ? lines.rows / lines.height : 0) : 1; }

struct Sinkhorn {
    const Table& table;
    const Group& h;
    const Tensor t;
    const Scalars& s;
    const int threads;
    const Total total;  // null where every matrix is whole here
    const int64_t padded;
    float* const row;   // of each line, what the squares of its elements are multiplied by
    float* const col;   // of each matrix [padded]: of each column
    int64_t bands = 1;
    double* partial = nullptr;  // [bands][padded], and as many numbers in fp32
    float* y = nullptr;         // [padded], of the power iteration
    // Every pass begins where the one before has ended, whose rows are in the cache.
    bool backward = true;

    // What `band` is told.
    int64_t first = 0;
    RowsThenColumns pass = nullptr;
    const float* factors = nullptr;

    Sinkhorn(const Table& table, const Group& h, const Tensor& lines, const Scalars& s, int threads, Total total, float* scales)
        : table(table), h(h), t(lines), s(s), threads(threads), total(lines.stacked ? nullptr : total),
          padded(scales_of_columns(lines.cols)), row(scales), col(scales + lines.rows) {
        const int64_t fit = smaller_of(t.height / FEWEST_ROWS, PARTIAL_SUMS / larger_of(padded, 1));
        while (2 * bands <= smaller_of(fit, MAX_BANDS)) bands *= 2;  // equal shares for two, four and eight threads
        partial = static_cast<double*>(std::malloc((bands * padded + 1) * (sizeof(double) + sizeof(float))));
        if (h.power_iterations > 0) y = static_cast<float*>(std::malloc((padded + 1) * sizeof(float)));
        if (!partial || (h.power_iterations > 0 && !y)) std::abort();
    }
    ~Sinkhorn() {
        std::free(partial);
        std::free(y);
    }
    Sinkhorn(const Sinkhorn&) = delete;

    static void band(void* context, int64_t task) {
        const Sinkhorn& w = *static_cast<const Sinkhorn*>(context);
        const int64_t b = w.backward ? w.bands - 1 - task : task;
        double* const sums = w.partial + b * w.padded;
        float* const few = reinterpret_cast<float*>(w.partial + w.bands * w.padded) + b * w.padded;
        std::memset(sums, 0, w.padded * sizeof(double));
        std::memset(few, 0, w.padded * sizeof(float));
        w.pass(w.t, w.s, w.first + w.t.height * b / w.bands, w.first + w.t.height * (b + 1) / w.bands, w.factors, w.row, sums, few);
    }

    // One pass over the m-th matrix: the sums of its columns, over the ranks too; null where that failed.
    const double* columns(int64_t m, RowsThenColumns which, const float* along) {
        backward = !backward;
        first = m * t.height, pass = which, factors = along;
        parallel(threads, bands, band, this);
        for (int64_t b = 1; b < bands; b++)
            for (int64_t c = 0; c < t.cols; c++) partial[c] += partial[b * padded + c];
        return total && total(partial, t.cols) ? nullptr : partial;
    }

    // The iterations from..., of which the first takes all columns for one. False where a sum over ranks failed.
    bool iterate(int64_t m, int64_t from, int64_t until) {
        float* const of_columns = col + m * padded;
        const double height = static_cast<double>(t.whole_height);
        for (int64_t c = 0; from == 0 && c < padded; c++) of_columns[c] = c < t.cols;
        for (int64_t i = from; i < until; i++) {
            const double* const sums = columns(m, table.squares_of_rows, of_columns);
            if (!sums) return false;
            for (int64_t c = 0; c < t.cols; c++) of_columns[c] = reciprocal(sums[c] / height);
        }
        return true;
    }

    // The square of the spectral norm of the matrix as it has been scaled, into `found`; TINY where there is no gradient.
    bool norm(int64_t m, double& found) {
        const float* const of_columns = col + m * padded;
        std::memset(y, 0, padded * sizeof(float));
        for (int64_t c = 0; c < t.cols; c++) y[c] = ((c * 2654435761 >> 31) & 1 ? -1 : 1) * std::sqrt(of_columns[c]);
        for (int64_t i = 0; i < static_cast<int64_t>(h.power_iterations); i++) {
            const double* const sums = columns(m, table.products_of_rows, y);
            if (!sums) return false;
            double squares = 0;
            for (int64_t c = 0; c < t.cols; c++) squares += sums[c] * sums[c] * of_columns[c];
            found = std::fmax(std::sqrt(squares), TINY);
            for (int64_t c = 0; c < t.cols; c++) y[c] = static_cast<float>(sums[c] * of_columns[c] / found);
        }
        return true;
    }

    // From squares to what elements are multiplied by.
    bool finish(int64_t m, int64_t from) {
        if (!iterate(m, from, static_cast<int64_t>(h.iterations))) return false;
        double factor = 1, found = TINY;
        if (h.power_iterations > 0 && !norm(m, found)) return false;
        if (found > TINY)
            factor = std::sqrt(static_cast<double>(t.whole_height) / static_cast<double>(t.cols)) / std::sqrt(found);
        for (int64_t r = m * t.height; r < (m + 1) * t.height; r++) row[r] = static_cast<float>(factor * std::sqrt(row[r]));
        for (int64_t c = 0; c < t.cols; c++) col[m * padded + c] = std::sqrt(col[m * padded + c]);
        return true;
    }
};

struct Update {
    const Table& table;
    const Tensor& t;
    const Scalars& s;
    const uint32_t* keys;
    int64_t per_row, rows, tasks;
    bool backward;
};

void update(void* context, int64_t task) {
    const Update& w = *static_cast<const Update*>(context);
    const int64_t r = (w.backward ? w.tasks - 1 - task : task) * w.rows, stop = smaller_of(r + w.rows, w.t.rows);
    Sums sums{};
    w.table.run[STEP_SINKGD][FMT_32BIT](w.t, w.s, w.keys, r * w.per_row, stop * w.per_row, sums);
}

}  // namespace

int64_t sinkgd_scales(const Tensor& t) {
    const Tensor lines = in_lines(t);
    return lines.rows + matrices_of(lines) * scales_of_columns(lines.cols);
}

bool begin_sinkgd(const Table& table, const Group& h, const Tensor& t, const Prepared& ready, int threads, Begun& begun) {
    Sinkhorn work(table, h, in_lines(t), *ready.scalars, threads, nullptr, begun.before);
    for (int64_t m = 0; m < matrices_of(work.t); m++) work.iterate(m, 0, 1);
    return table.all_finite(begun.before, sinkgd_scales(t), F32);
}

bool step_sinkgd(const Table& table, const Group& h, const Tensor& t, const Prepared& ready, int threads, Total total,
                 const Begun* begun) {
    float* const own = begun ? nullptr : static_cast<float*>(std::malloc((sinkgd_scales(t) + 1) * sizeof(float)));
    if (!begun && !own) std::abort();  // 4 bytes for each row and column
    Sinkhorn work(table, h, in_lines(t), *ready.scalars, threads, total, begun ? begun->before : own);
    bool going = true;
    for (int64_t m = 0; going && m < matrices_of(work.t); m++) going = work.finish(m, begun ? 1 : 0);
    if (going && work.t.rows) {
        Tensor scaled = work.t;
        scaled.data[0] = work.row, scaled.aux[0] = work.col;
        Update job{table, scaled, *ready.scalars, ready.keys, chunks_of(scaled.cols), 0, 0, !work.backward};
        job.rows = larger_of(PIECE / job.per_row, 1);
        job.tasks = (scaled.rows + job.rows - 1) / job.rows;
        parallel(threads, job.tasks, update, &job);
    }
    std::free(own);
    return going;
}

}  // namespace memopt
