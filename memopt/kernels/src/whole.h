// Rules that need statistics of the whole tensor or of its rows: factored moments, row means and clipped updates.
#pragma once
#include "table.h"

namespace memopt {

// Tensors from this size on are stepped by all threads together, smaller ones by one thread each.
constexpr int64_t LARGE = 1 << 19;

struct Prepared {
    const Scalars* scalars;
    int64_t step;
    uint32_t keys[SLOTS + 2];  // of each moment, what the step adds, of the master
    int pass;  // of an element-wise rule, else -1
};

// Adam-mini's second moment at this step.
void renew_row_means(const Table&, const Tensor&, double beta2, const Scalars&, int threads);

// Returns false where `total` failed. Sums over ranks are taken one after the other, in the order and of the size in
// which the rule in memopt/rules takes them, so that ranks may step the same parameter in different ways.
bool whole_step(const Table&, const Group&, const Tensor&, const Prepared&, int threads, Total total);

int step(const Table&, const Group*, Tensor*, int64_t count, uint32_t seed, int threads, Total total);
// 0: all gradients are finite, 2: some are not, 1: there was no memory and nobody has looked.
int look(const Table&, Span*, int64_t count, bool summed, int threads);

}  // namespace memopt
