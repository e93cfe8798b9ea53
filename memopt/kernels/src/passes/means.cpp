// New row and column means of a factored moment: what is to be averaged, x, is summed over the rows and the columns, and
// beside it stand the sums of what is kept of the reconstruction row * col / mean, which need no pass. A large matrix
// is cut into bands of rows if it is tall, of columns if it is wide; sums across the cut are kept per band and added in
// order. Columns are summed over 32 rows in fp32, then in fp64, a few chunks of columns at a time: what is added to
// stays in the caches nearby, and rows are read in long stretches.
//
// The square of an update g / sqrt(row * col / mean) is (g² / row) * mean / col. Where the means of rows are final before
// those of columns, g² / row is summed over the columns while the rows are in the cache, and divided when the columns are
// final: the size of the update costs no read of the gradient.
#include "passes/means.h"

#include <cstdlib>
#include <cstring>

#include "pool.h"
#include "passes/whole.h"

namespace memopt {
namespace {

// Rows whose columns are summed in fp32: one where ranks share them, so that it does not show where they are cut.
constexpr int64_t FLUSH = 32, MAX_BANDS = 16, BLOCK = 4;  // BLOCK: chunks of columns
constexpr int64_t PARTIAL_SUMS = 1 << 16;  // doubles kept across the cut: half a MiB
constexpr int64_t FEW_COLS = PARTIAL_SUMS / MAX_BANDS;

double sum_of(const float* x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

const float* rows_of(const Tensor& t, int slot, int64_t matrix) {
    return static_cast<const float*>(t.data[slot]) + matrix * t.height;
}
const float* columns_of(const Tensor& t, int slot, int64_t matrix) {
    return static_cast<const float*>(t.aux[slot]) + matrix * t.cols;
}

float mean_of(const Tensor& t, int slot, int64_t matrix, float floor) {
    // Of a matrix the mean of the column means, of one of a stack that of the row means, as factored.py has it.
    const int64_t n = t.stacked ? t.height : t.cols;
    const double sum = sum_of(t.stacked ? rows_of(t, slot, matrix) : columns_of(t, slot, matrix), n);
    const float mean = static_cast<float>(sum / static_cast<double>(n));
    return mean < floor ? floor : mean;
}

// One matrix, or what is here of one.
struct Renewal {
    const Table& table;
    const Tensor& t;
    const Scalars& s;
    const uint32_t* keys;
    const Change change;
    const Means means;
    const int64_t matrix, per_row;
    float* const row;
    float* const col;
    const bool tall;
    const int64_t flush;
    int64_t bands = 1;
    double* partial = nullptr;  // [bands][cols] of a tall matrix, [bands][height] of a wide one
    double* updates = nullptr;  // [bands][cols]: sums of g² / row, of a tall matrix where they are asked for
    double of_rows, of_cols;    // a row mean, a column mean times this: what is kept, summed along the row or column

    Renewal(const Table& table, const Tensor& t, const Scalars& s, const uint32_t* keys, const Change& change,
            const Means& all, int64_t matrix, bool tall)
        : table(table), t(t), s(s), keys(keys), change(change), means(all.of(t, matrix)), matrix(matrix),
          per_row(chunks_of(t.cols)), row(const_cast<float*>(rows_of(t, change.slot, matrix))),
          col(const_cast<float*>(columns_of(t, change.slot, matrix))), tall(tall), flush(t.cut ? 1 : FLUSH) {
        const double kept = change.keep / static_cast<double>(means.known[change.slot]);
        of_rows = kept * sum_of(col, t.cols);
        of_cols = kept * sum_of(row, t.height);
    }
    void put_row(int64_t i, double sum) const {
        row[i] = static_cast<float>((row[i] * of_rows + change.take * sum) / static_cast<double>(t.cols));
    }
    double column(int64_t c, double sum) const { return col[c] * of_cols + change.take * sum; }
};

int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows r0 ... r1 - 1 (`flush` at most) of chunks k0 ... k1 - 1 (BLOCK at most). Row sums of what the pass gives are added
// to `rows`, column sums to `cols`.
void strip(const Renewal& w, Pass pass, int64_t r0, int64_t r1, int64_t k0, int64_t k1, double* rows, double* cols) {
    const Tensor& t = w.t;
    const Run run = w.table.run[pass][t.format];
    const int64_t first = k0 * CHUNK, width = smaller_of(k1 * CHUNK, t.cols) - first;
    alignas(64) float column[BLOCK * CHUNK], roots[SLOTS * BLOCK * CHUNK];
    Sums sums{};
    w.means.set(w.table, t, w.matrix, first, width, sums, roots);
    std::memset(column, 0, (k1 - k0) * CHUNK * sizeof(float));
    sums.column = column;
    for (int64_t r = r0; r < r1; r++) {
        const int64_t chunk = (w.matrix * t.height + r) * w.per_row;
        sums.row = 0;
        run(t, w.s, w.keys, chunk + k0, chunk + k1, sums);
        rows[r - r0] += sums.row;
    }
    for (int64_t c = 0; c < width; c++) cols[c] += column[c];
}

// Rows r0 ... r1 - 1, all columns: row means are final, column sums are added to `cols`, and to `updates` if not null.
void tall_tile(const Renewal& w, int64_t r0, int64_t r1, double* cols, double* updates) {
    for (int64_t r = r0; r < r1; r += w.flush) {
        const int64_t stop = smaller_of(r + w.flush, r1);
        double rows[FLUSH] = {};
        const auto columns = [&](Pass pass, double* into) {
            for (int64_t k = 0; k < w.per_row; k += BLOCK)
                strip(w, pass, r, stop, k, smaller_of(k + BLOCK, w.per_row), rows, into + k * CHUNK);
        };
        columns(w.change.pass, cols);
        for (int64_t i = r; i < stop; i++) w.put_row(i, rows[i - r]);
        if (updates) columns(COLUMNS_OF_UPDATE, updates);
    }
}

// All rows, chunks k0 ... k1 - 1: column means are final, row sums are added to `rows`.
void wide_tile(const Renewal& w, int64_t k0, int64_t k1, double* rows) {
    for (int64_t k = k0; k < k1; k += BLOCK) {
        const int64_t stop = smaller_of(k + BLOCK, k1);
        double cols[BLOCK * CHUNK] = {};
        for (int64_t r = 0; r < w.t.height; r += w.flush)
            strip(w, w.change.pass, r, smaller_of(r + w.flush, w.t.height), k, stop, rows + r, cols);
        const int64_t first = k * CHUNK, end = smaller_of(stop * CHUNK, w.t.cols);
        for (int64_t c = first; c < end; c++)
            w.col[c] = static_cast<float>(w.column(c, cols[c - first]) / static_cast<double>(w.t.height));
    }
}

// Bands of n sums are added to the first.
void add_up(double* sums, int64_t bands, int64_t n) {
    for (int64_t b = 1; b < bands; b++)
        for (int64_t i = 0; i < n; i++) sums[i] += sums[b * n + i];
}

// The sums across the cut become means: of the columns of a tall matrix, of the rows of a wide one. `total` adds them
// up over the ranks that hold other rows.
bool finish(const Renewal& w, Total total) {
    const Tensor& t = w.t;
    const int64_t n = w.tall ? t.cols : t.height;
    double* sums = w.partial;
    add_up(sums, w.bands, n);
    if (!w.tall) {
        for (int64_t i = 0; i < n; i++) w.put_row(i, sums[i]);
        return true;
    }
    for (int64_t c = 0; c < n; c++) sums[c] = w.column(c, sums[c]);
    if (total && total(sums, n)) return false;
    for (int64_t c = 0; c < n; c++) w.col[c] = static_cast<float>(sums[c] / static_cast<double>(t.whole_height));
    return true;
}

// The squares of the updates of a matrix, whose means are final.
double squares_of_updates(const Renewal& w) {
    const Tensor& t = w.t;
    add_up(w.updates, w.bands, t.cols);
    double sum = 0;
    for (int64_t c = 0; c < t.cols; c++) sum += w.updates[c] / w.col[c];
    return sum * mean_of(t, w.change.slot, w.matrix, w.means.floor[w.change.slot]);
}

struct Matrices {
    const Table& table;
    const Tensor& t;
    const Scalars& s;
    const uint32_t* keys;
    const Change& change;
    const Means& means;
    int64_t group;  // matrices of one task
    bool tall;
};

void whole_matrices(void* context, int64_t task) {
    const Matrices& all = *static_cast<Matrices*>(context);
    const int64_t count = all.t.rows / all.t.height, last = smaller_of((task + 1) * all.group, count);
    double across[FEW_COLS];  // under LARGE elements the shorter side is shorter than that
    for (int64_t matrix = task * all.group; matrix < last; matrix++) {
        Renewal one(all.table, all.t, all.s, all.keys, all.change, all.means, matrix, all.tall);
        std::memset(across, 0, sizeof across);
        one.partial = across;
        if (one.tall) tall_tile(one, 0, one.t.height, across, nullptr);
        else wide_tile(one, 0, one.per_row, across);
        finish(one, nullptr);
    }
}

void band(void* context, int64_t b) {
    const Renewal& w = *static_cast<Renewal*>(context);
    const int64_t n = w.tall ? w.t.cols : w.t.height;
    double *partial = w.partial + b * n, *updates = w.updates ? w.updates + b * n : nullptr;
    std::memset(partial, 0, n * sizeof(double));
    if (updates) std::memset(updates, 0, n * sizeof(double));
    if (w.tall) tall_tile(w, w.t.height * b / w.bands, w.t.height * (b + 1) / w.bands, partial, updates);
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

void Means::of_each(const Tensor& t, int slot, float* out) const {
    const int64_t matrices = t.height ? t.rows / t.height : 0;
    for (int64_t matrix = 0; matrix < matrices; matrix++) out[matrix] = mean_of(t, slot, matrix, floor[slot]);
}

void Means::set(const Table& table, const Tensor& t, int64_t matrix, int64_t first, int64_t width, Sums& sums,
                float* roots) const {
    sums.first_col = first;
    for (int slot = 0; slot < SLOTS; slot++) {
        sums.mean[slot] = used[slot] && !fixed && t.height != t.rows ? mean_of(t, slot, matrix, floor[slot]) : known[slot];
        sums.root[slot] = ready[slot] ? ready[slot] + first : roots + slot * width;
        if (used[slot] && slot != renewed && !ready[slot])
            table.inverse_roots(columns_of(t, slot, matrix) + first, roots + slot * width, width);
    }
}

namespace {

bool is_tall(const Tensor& t) { return t.height >= t.cols || t.cols <= FEW_COLS; }

}  // namespace

bool updates_with_means(const Tensor& t) { return !t.cut && t.height * t.cols >= LARGE && is_tall(t); }

bool renew_means(const Table& table, const Tensor& t, const Scalars& s, const uint32_t* keys, const Change& change,
                 const Means& means, int threads, Total total, double* squares) {
    const bool shared = total && !t.stacked;  // of a stack, every matrix is whole on its rank
    const bool tall = shared || is_tall(t);
    const int64_t matrices = shared ? 1 : t.height ? t.rows / t.height : 0, numel = t.height * t.cols;
    if (!shared && numel < LARGE) {
        if (!numel) return true;
        Matrices all{table, t, s, keys, change, means, LARGE / 8 / numel + 1, tall};
        parallel(threads, (matrices + all.group - 1) / all.group, whole_matrices, &all);
        return true;
    }
    const int64_t across = tall ? t.cols : t.height, along = tall ? t.height / FLUSH : chunks_of(t.cols);
    int64_t bands = smaller_of(smaller_of(PARTIAL_SUMS / across, MAX_BANDS), along);
    if (bands < 1) bands = 1;
    double* partial = static_cast<double*>(std::malloc((squares ? 2 : 1) * bands * across * sizeof(double)));
    if (!partial) std::abort();
    if (squares) *squares = 0;
    bool done = true;
    for (int64_t matrix = 0; done && matrix < matrices; matrix++) {
        Renewal one(table, t, s, keys, change, means, matrix, tall);
        one.bands = bands;
        one.partial = partial;
        if (squares) one.updates = partial + bands * across;
        parallel(threads, bands, band, &one);
        done = finish(one, shared ? total : nullptr);
        if (squares) *squares += squares_of_updates(one);
    }
    std::free(partial);
    return done;
}

}  // namespace memopt
