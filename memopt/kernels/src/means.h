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
    int renewed = -1;    // the slot whose means are being written: nothing reads its roots
    bool fixed = false;  // `known` is the mean of the matrix at hand, whose rows are being written

    explicit Means(double tiny) {
        for (int slot = 0; slot < SLOTS; slot++) floor[slot] = static_cast<float>(tiny), known[slot] = 1;
    }
    void prepare(const Tensor& t, int slot);
    // Fills what a call over chunks of this matrix needs. `scratch` has room for roots_size(t) floats.
    void set(const Table& table, const Tensor& t, int64_t matrix, Sums& sums, float* scratch) const;
};

// Roots of the column means of every slot.
inline int64_t roots_size(const Tensor& t) { return t.format == FMT_FACTORED ? SLOTS * t.cols : 0; }

// A pass that decodes a factored moment, changes it, and keeps the means of what it became.
void renew_means(const Table&, const Tensor&, const Scalars&, const uint32_t* keys, Pass, int slot, const Means&,
                 int threads);

}  // namespace memopt
