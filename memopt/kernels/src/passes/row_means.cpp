// Adam-mini's second moment: one number for each run of `span` elements, renewed by the mean of their squared gradients.
// Sums are added in an order that depends on the shape only.
#include <cstdlib>

#include "pool.h"
#include "passes/whole.h"

namespace memopt {
namespace {

constexpr int64_t PIECE = 64;  // chunks that one thread takes at a time

struct Renewal {
    const Table& table;
    const Scalars& s;
    const Tensor view;  // a row for each number
    const double beta2;
    int64_t per_row, group, row;  // chunks of a row; rows of one task where rows are not cut; the row where they are
    double* partial;

    double squares(int64_t first, int64_t last) const {
        Sums sums{};
        table.run[SUM_GRADIENT][view.format](view, s, nullptr, first, last, sums);
        return sums.total;
    }
    void put(int64_t r, double squares) const {
        const int64_t left = view.numel - r * view.cols, n = left < view.cols ? left : view.cols;
        float& v = static_cast<float*>(view.data[0])[r];
        v = static_cast<float>(beta2 * v + (1 - beta2) * (squares / static_cast<double>(n)));
    }
};

void whole_rows(void* context, int64_t task) {
    const Renewal& w = *static_cast<Renewal*>(context);
    const int64_t first = task * w.group, last = first + w.group < w.view.rows ? first + w.group : w.view.rows;
    for (int64_t r = first; r < last; r++) w.put(r, w.squares(r * w.per_row, (r + 1) * w.per_row));
}

void part_of_row(void* context, int64_t task) {
    const Renewal& w = *static_cast<Renewal*>(context);
    const int64_t first = task * PIECE, last = first + PIECE < w.per_row ? first + PIECE : w.per_row;
    w.partial[task] = w.squares(w.row * w.per_row + first, w.row * w.per_row + last);
}

}  // namespace

void renew_row_means(const Table& table, const Tensor& t, double beta2, const Scalars& s, int threads) {
    Tensor view = t;
    view.rows = (t.numel + t.span - 1) / t.span;
    view.cols = t.span;
    Renewal w{table, s, view, beta2, chunks_of(t.span), 1, 0, nullptr};
    const int64_t pieces = (w.per_row + PIECE - 1) / PIECE;
    if (pieces == 1) {
        w.group = PIECE / w.per_row;
        return parallel(threads, (view.rows + w.group - 1) / w.group, whole_rows, &w);
    }
    w.partial = static_cast<double*>(std::malloc(pieces * sizeof(double)));
    if (!w.partial) std::abort();  // 8 bytes per 65536 elements
    for (w.row = 0; w.row < view.rows; w.row++) {
        parallel(threads, pieces, part_of_row, &w);
        double squares = 0;
        for (int64_t i = 0; i < pieces; i++) squares += w.partial[i];
        w.put(w.row, squares);
    }
    std::free(w.partial);
}

}  // namespace memopt
