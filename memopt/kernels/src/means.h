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

    explicit Means(double tiny) {
        for (int slot = 0; slot < SLOTS; slot++) floor[slot] = static_cast<float>(tiny), known[slot] = 1;
    }
    void prepare(const Tensor& t, int slot);
    void set(const Tensor& t, int64_t matrix, float* mean) const;
};

// A pass that decodes a factored moment, changes it, and keeps the means of what it became.
void renew_means(const Table&, const Tensor&, const Scalars&, const uint32_t* keys, Pass, int slot, const Means&,
                 int threads);

}  // namespace memopt
