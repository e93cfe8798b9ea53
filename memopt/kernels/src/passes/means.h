// Row and column means of a factored moment.
#pragma once
#include "table.h"

namespace memopt {

// What a reconstruction row * col / mean divides by. A single matrix has one mean, found once; of a batch of matrices
// it is found when a matrix is come to.
struct Means {
    float floor[SLOTS];
    float known[SLOTS];
    bool used[SLOTS] = {};
    const float* ready[SLOTS] = {};  // 1 / sqrt of all column means of a single matrix, where they were found before
    int renewed = -1;    // the slot whose means are being written: nothing reads its roots
    bool fixed = false;  // `known` are the means of the matrix at hand

    explicit Means(double tiny) {
        for (int slot = 0; slot < SLOTS; slot++) floor[slot] = static_cast<float>(tiny), known[slot] = 1;
    }
    void prepare(const Tensor& t, int slot);
    // The same with the means of one matrix, which stay as they are now while its rows are written.
    Means of(const Tensor& t, int64_t matrix) const;
    // The mean of each matrix of a stack, `out` having room for all of them.
    void of_each(const Tensor& t, int slot, float* out) const;
    // Fills what a call over columns first ... first + width - 1 of this matrix needs; `roots` has room for SLOTS of them.
    void set(const Table& table, const Tensor& t, int64_t matrix, int64_t first, int64_t width, Sums& sums,
             float* roots) const;
};

// A moment becomes keep * moment + take * x; the pass gives x.
struct Change {
    Pass pass;
    int slot;
    double keep, take;
};

// Whether renew_means can find the squares of g / sqrt(the renewed moment) besides.
bool updates_with_means(const Tensor&);

// The means of what a moment becomes, and in `squares` the sum of those squares, unless it is null. Returns false where
// `total` failed, which was given if ranks share the rows.
bool renew_means(const Table&, const Tensor&, const Scalars&, const uint32_t* keys, const Change&, const Means&,
                 int threads, Total total, double* squares);

}  // namespace memopt
