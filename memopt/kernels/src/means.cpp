// New row and column means. A large matrix is cut into bands of rows if it is tall, of columns if it is wide; sums
// across the cut are kept per band and added in order. Columns are summed over 32 rows in fp32, then in fp64.
#include "means.h"

#include <cstdlib>
#include <cstring>

#include "pool.h"
#include "whole.h"

namespace memopt {
namespace {

constexpr int64_t FLUSH = 32, MAX_BANDS = 16;
constexpr int64_t PARTIAL_SUMS = 1 << 16;  // doubles kept across the cut: half a MiB

float mean_of(const Tensor& t, int slot, int64_t matrix, float floor) {
    // Of a single matrix the mean of the column means, of a batch that of the row means, as factored.py has it.
    const bool single = t.height == t.rows;
    const float* x = static_cast<const float*>(single ? t.aux[slot] : t.data[slot]) + (single ? 0 : matrix * t.height);
    const int64_t n = single ? t.cols : t.height;
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
    const Means& means;
    int64_t per_row, bands, matrix, group;  // group: matrices of one task, where matrices are not cut
    bool tall;
    double* partial;  // [bands][cols] of a tall matrix, [bands][height] of a wide one
};

// Rows r0 ... r1 - 1 and chunks k0 ... k1 - 1 of one matrix. Row sums go to `rows` if that is given, else the row means
// are final; the same for columns.
void tile(const Renewal& w, int64_t matrix, int64_t r0, int64_t r1, int64_t k0, int64_t k1, double* rows, double* cols,
          float* scratch, Sums& sums) {
    const Tensor& t = w.t;
    const Run run = w.table.run[w.pass][t.format];
    const int64_t end = k1 * CHUNK < t.cols ? k1 * CHUNK : t.cols, width = end - k0 * CHUNK;
    float* row_means = static_cast<float*>(t.data[w.slot]) + matrix * t.height;
    float* col_means = static_cast<float*>(t.aux[w.slot]) + matrix * t.cols + k0 * CHUNK;
    double* const wide = cols ? cols : reinterpret_cast<double*>(scratch + (width + 31) / 16 * 16);
    std::memset(wide, 0, width * sizeof(double));
    std::memset(scratch, 0, (width + 16) * sizeof(float));
    sums.column = scratch;
    sums.first_col = k0 * CHUNK;
    for (int64_t r = r0; r < r1; r++) {
        const int64_t chunk = (matrix * t.height + r) * w.per_row;
        sums.row = 0;
        run(t, w.s, w.keys, chunk + k0, chunk + k1, sums);
        if (rows) rows[r] = sums.row;
        else row_means[r] = static_cast<float>(sums.row / static_cast<double>(t.cols));
        if ((r - r0) % FLUSH == FLUSH - 1 || r == r1 - 1)
            for (int64_t c = 0; c < width; c++) {
                wide[c] += scratch[c];
                scratch[c] = 0;
            }
    }
    if (!cols)
        for (int64_t c = 0; c < width; c++) col_means[c] = static_cast<float>(wide[c] / static_cast<double>(t.height));
}

// Floats of a tile: sums of columns in fp32, and in fp64 behind them.
int64_t scratch_size(int64_t width) { return (width + 32) * 3; }

float* make_scratch(int64_t width, int64_t more) {
    void* scratch = nullptr;
    if (posix_memalign(&scratch, 64, (scratch_size(width) + more) * sizeof(float))) std::abort();
    return static_cast<float*>(scratch);
}

void whole_matrices(void* context, int64_t task) {
    const Renewal& w = *static_cast<Renewal*>(context);
    const int64_t count = w.t.rows / w.t.height, last = (task + 1) * w.group < count ? (task + 1) * w.group : count;
    float* scratch = make_scratch(w.t.cols, roots_size(w.t));
    float* roots = scratch + scratch_size(w.t.cols);
    Sums sums{};
    for (int64_t matrix = task * w.group; matrix < last; matrix++) {
        w.means.set(w.table, w.t, matrix, sums, roots);
        tile(w, matrix, 0, w.t.height, 0, w.per_row, nullptr, nullptr, scratch, sums);
    }
    std::free(scratch);
}

void band(void* context, int64_t b) {
    const Renewal& w = *static_cast<Renewal*>(context);
    const Tensor& t = w.t;
    const int64_t k0 = w.tall ? 0 : w.per_row * b / w.bands, k1 = w.tall ? w.per_row : w.per_row * (b + 1) / w.bands;
    const int64_t width = (k1 - k0) * CHUNK;
    float* scratch = make_scratch(width, roots_size(t));
    Sums sums{};
    w.means.set(w.table, t, w.matrix, sums, scratch + scratch_size(width));
    if (w.tall)
        tile(w, w.matrix, t.height * b / w.bands, t.height * (b + 1) / w.bands, 0, w.per_row, nullptr,
             w.partial + b * t.cols, scratch, sums);
    else
        tile(w, w.matrix, 0, t.height, k0, k1, w.partial + b * t.height, nullptr, scratch, sums);
    std::free(scratch);
}

void add_bands(const Renewal& w) {
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

}  // namespace

void Means::prepare(const Tensor& t, int slot) {
    used[slot] = true;
    if (t.height == t.rows) known[slot] = mean_of(t, slot, 0, floor[slot]);
}

void Means::set(const Table& table, const Tensor& t, int64_t matrix, Sums& sums, float* scratch) const {
    for (int slot = 0; slot < SLOTS; slot++) {
        sums.mean[slot] = used[slot] && !fixed && t.height != t.rows ? mean_of(t, slot, matrix, floor[slot]) : known[slot];
        sums.root[slot] = scratch + slot * t.cols;
        if (used[slot] && slot != renewed)
            table.inverse_roots(static_cast<const float*>(t.aux[slot]) + matrix * t.cols, scratch + slot * t.cols, t.cols);
    }
}

void renew_means(const Table& table, const Tensor& t, const Scalars& s, const uint32_t* keys, Pass pass, int slot,
                 const Means& means, int threads) {
    Renewal w{table, t, s, keys, pass, slot, means, chunks_of(t.cols), 1, 0, 1,
              t.height >= t.cols || t.cols * MAX_BANDS <= PARTIAL_SUMS, nullptr};
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
        Means here = means;
        here.fixed = true;
        for (int k = 0; k < SLOTS; k++)
            if (here.used[k] && matrices > 1) here.known[k] = mean_of(t, k, w.matrix, here.floor[k]);
        Renewal one{table, t, s, keys, pass, slot, here, w.per_row, w.bands, w.matrix, 1, w.tall, w.partial};
        parallel(threads, w.bands, band, &one);
        add_bands(one);
    }
    std::free(w.partial);
}

}  // namespace memopt
