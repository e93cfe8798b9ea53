// New row and column means. A large matrix is cut into bands of rows if it is tall, of columns if it is wide; sums
// across the cut are kept per band and added in order. Columns are summed over 32 rows in
// fp32, then in fp64, a chunk of columns at a time, so that what is added to stays in the first-level cache.
#include "means.h"

#include <cstdlib>
#include <cstring>

#include "pool.h"
#include "whole.h"

namespace memopt {
namespace {

constexpr int64_t FLUSH = 32, MAX_BANDS = 16;
constexpr int64_t PARTIAL_SUMS = 1 << 16;  // doubles kept across the cut: half a MiB
constexpr int64_t FEW_COLS = PARTIAL_SUMS / MAX_BANDS;

float mean_of(const Tensor& t, int slot, int64_t matrix, float floor) {
    // Of a matrix the mean of the column means, of one of a stack that of the row means, as factored.py has it.
    const float* x = static_cast<const float*>(t.stacked ? t.data[slot] : t.aux[slot]) + matrix * t.height;
    const int64_t n = t.stacked ? t.height : t.cols;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    const float mean = static_cast<float>(sum / static_cast<double>(n));
    return mean < floor ? floor : mean;
}

struct Renewal {
    const Table& table;
    const Tensor& t;
    const Scalars& s;
    const uint32_t* keys;
    Pass pass;
    int slot;
    Means means;
    int64_t per_row, bands, matrix, group;  // group: matrices of one task, where matrices are not cut
    bool tall;
    double* partial;  // [bands][cols] of a tall matrix, [bands][height] of a wide one
};

// Rows r0 ... r1 - 1 (FLUSH at most) of one chunk's columns. Row sums are added to `rows`, column sums to `cols`.
void strip(const Renewal& w, int64_t r0, int64_t r1, int64_t k, double* rows, double* cols) {
    const Tensor& t = w.t;
    const Run run = w.table.run[w.pass][t.format];
    const int64_t first = k * CHUNK, width = t.cols - first < CHUNK ? t.cols - first : CHUNK;
    alignas(64) float column[CHUNK], roots[SLOTS * CHUNK];
    Sums sums{};
    w.means.set(w.table, t, w.matrix, first, width, sums, roots);
    std::memset(column, 0, sizeof column);
    sums.column = column;
    for (int64_t r = r0; r < r1; r++) {
        const int64_t chunk = (w.matrix * t.height + r) * w.per_row + k;
        sums.row = 0;
        run(t, w.s, w.keys, chunk, chunk + 1, sums);
        rows[r - r0] += sums.row;
    }
    for (int64_t c = 0; c < width; c++) cols[c] += column[c];
}

int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows r0 ... r1 - 1, all columns: row means are final, column sums are added to `cols`.
void tall_tile(const Renewal& w, int64_t r0, int64_t r1, double* cols) {
    float* means = static_cast<float*>(w.t.data[w.slot]) + w.matrix * w.t.height;
    for (int64_t r = r0; r < r1; r += FLUSH) {
        const int64_t stop = smaller_of(r + FLUSH, r1);
        double rows[FLUSH] = {};
        for (int64_t k = 0; k < w.per_row; k++) strip(w, r, stop, k, rows, cols + k * CHUNK);
        for (int64_t i = r; i < stop; i++) means[i] = static_cast<float>(rows[i - r] / static_cast<double>(w.t.cols));
    }
}

// All rows, chunks k0 ... k1 - 1: column means are final, row sums are added to `rows`.
void wide_tile(const Renewal& w, int64_t k0, int64_t k1, double* rows) {
    float* means = static_cast<float*>(w.t.aux[w.slot]) + w.matrix * w.t.cols;
    for (int64_t k = k0; k < k1; k++) {
        double cols[CHUNK] = {};
        for (int64_t r = 0; r < w.t.height; r += FLUSH)
            strip(w, r, smaller_of(r + FLUSH, w.t.height), k, rows + r, cols);
        const int64_t first = k * CHUNK, end = smaller_of(first + CHUNK, w.t.cols);
        for (int64_t c = first; c < end; c++)
            means[c] = static_cast<float>(cols[c - first] / static_cast<double>(w.t.height));
    }
}

// The sums across the cut become means: of the columns of a tall matrix, of the rows of a wide one.
void finish(const Renewal& w) {
    const Tensor& t = w.t;
    const int64_t n = w.tall ? t.cols : t.height;
    float* means = w.tall ? static_cast<float*>(t.aux[w.slot]) + w.matrix * t.cols
                          : static_cast<float*>(t.data[w.slot]) + w.matrix * t.height;
    const double count = static_cast<double>(w.tall ? t.height : t.cols);
    for (int64_t i = 0; i < n; i++) {
        double sum = 0;
        for (int64_t b = 0; b < w.bands; b++) sum += w.partial[b * n + i];
        means[i] = static_cast<float>(sum / count);
    }
}

void whole_matrices(void* context, int64_t task) {
    const Renewal& w = *static_cast<Renewal*>(context);
    const int64_t count = w.t.rows / w.t.height, last = smaller_of((task + 1) * w.group, count);
    double across[FEW_COLS];  // under LARGE elements the shorter side is shorter than that
    for (int64_t matrix = task * w.group; matrix < last; matrix++) {
        const Renewal one{w.table, w.t, w.s, w.keys, w.pass, w.slot, w.means.of(w.t, matrix), w.per_row, 1, matrix, 1,
                          w.tall, across};
        std::memset(across, 0, sizeof across);
        if (w.tall) tall_tile(one, 0, w.t.height, across);
        else wide_tile(one, 0, w.per_row, across);
        finish(one);
    }
}

void band(void* context, int64_t b) {
    const Renewal& w = *static_cast<Renewal*>(context);
    const int64_t n = w.tall ? w.t.cols : w.t.height;
    double* partial = w.partial + b * n;
    std::memset(partial, 0, n * sizeof(double));
    if (w.tall) tall_tile(w, w.t.height * b / w.bands, w.t.height * (b + 1) / w.bands, partial);
    else wide_tile(w, w.per_row * b / w.bands, w.per_row * (b + 1) / w.bands, partial);
}

}  // namespace

void Means::prepare(const Tensor& t, int slot) {
    used[slot] = true;
    if (t.height == t.rows) known[slot] = mean_of(t, slot, 0, floor[slot]);
}

Means Means::of(const Tensor& t, int64_t matrix) const {
    Means one = *this;
    one.fixed = true;
    for (int slot = 0; slot < SLOTS; slot++)
        if (used[slot] && t.height != t.rows) one.known[slot] = mean_of(t, slot, matrix, floor[slot]);
    return one;
}

void Means::set(const Table& table, const Tensor& t, int64_t matrix, int64_t first, int64_t width, Sums& sums,
                float* roots) const {
    sums.first_col = first;
    for (int slot = 0; slot < SLOTS; slot++) {
        sums.mean[slot] = used[slot] && !fixed && t.height != t.rows ? mean_of(t, slot, matrix, floor[slot]) : known[slot];
        sums.root[slot] = roots + slot * width;
        if (used[slot] && slot != renewed)
            table.inverse_roots(static_cast<const float*>(t.aux[slot]) + matrix * t.cols + first, roots + slot * width,
                                width);
    }
}

void renew_means(const Table& table, const Tensor& t, const Scalars& s, const uint32_t* keys, Pass pass, int slot,
                 const Means& means, int threads) {
    Renewal w{table, t, s, keys, pass, slot, means, chunks_of(t.cols), 1, 0, 1,
              t.height >= t.cols || t.cols <= FEW_COLS, nullptr};
    const int64_t matrices = t.rows / t.height, numel = t.height * t.cols;
    if (numel < LARGE) {
        w.group = LARGE / 8 / numel + 1;
        parallel(threads, (matrices + w.group - 1) / w.group, whole_matrices, &w);
        return;
    }
    const int64_t across = w.tall ? t.cols : t.height, along = w.tall ? t.height : w.per_row;
    w.bands = PARTIAL_SUMS / across;
    if (w.bands > MAX_BANDS) w.bands = MAX_BANDS;
    if (w.bands > along) w.bands = along;
    if (w.bands < 1) w.bands = 1;
    w.partial = static_cast<double*>(std::malloc(w.bands * across * sizeof(double)));
    if (!w.partial) std::abort();
    for (w.matrix = 0; w.matrix < matrices; w.matrix++) {
        Renewal one{table, t, s, keys, pass, slot, means.of(t, w.matrix), w.per_row, w.bands, w.matrix, 1, w.tall, w.partial};
        parallel(threads, w.bands, band, &one);
        finish(one);
    }
    std::free(w.partial);
}

}  // namespace memopt
