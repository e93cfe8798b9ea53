// Rules that need statistics of the whole tensor or of its rows: factored moments, row means and clipped updates.
#pragma once
#include "table.h"

namespace memopt {

// Tensors from this size on are stepped by all threads together, smaller ones by one thread each. The sanitizers, under
// which everything takes ten times as long, go through the same code with smaller ones.
#ifndef MEMOPT_LARGE
#define MEMOPT_LARGE (1 << 19)
#endif
constexpr int64_t LARGE = MEMOPT_LARGE;

struct Prepared {
    const Scalars* scalars;
    int64_t step;
    uint32_t keys[SLOTS + 4];  // Place::keys
    int pass;  // of an element-wise rule, else -1
};

// Adam-mini's second moment at this step.
void renew_row_means(const Table&, const Tensor&, double beta2, const Scalars&, int threads);

struct Totals {
    double rule, squares;
};

// What the first pass of a tensor's step has found and written. Every rule that takes several passes begins with one
// that shows by numbers which are not finite that an element of the gradient is not, and writes the means of the second
// moment at most, of which a copy is kept: so nobody need look at the gradient before.
struct Begun {
    Totals sums;    // where it takes sums
    float* before;  // room for the means as they were, or for what is to be used once
    bool written;   // whether they were written
};

// SinkGD's (sinkgd.cpp): the scales of rows and columns, which its first pass leaves in `before`, and its step.
int64_t sinkgd_scales(const Tensor&);
bool begin_sinkgd(const Table&, const Group&, const Tensor&, const Prepared&, int threads, Begun&);
bool step_sinkgd(const Table&, const Group&, const Tensor&, const Prepared&, int threads, Total total, const Begun*);

// Numbers that `before` must have room for.
int64_t floats_to_keep(const Group&, const Tensor&);
// Whether its first pass shows what is not finite. The gradients of others are looked at.
bool shows_what_is_not_finite(const Group&, const Tensor&);
// The first pass. Returns whether all it has found is finite. Where it is not, a gradient may be finite all the same:
// its squares need not be.
bool begin(const Table&, const Group&, const Tensor&, const Prepared&, int threads, Begun&);
// Makes it as if it had not been.
void undo(const Group&, const Tensor&, const Begun&);

// Returns false where `total` failed. `begun` is null where the first pass is still to be made. Sums over ranks are
// taken one after the other, in the order and of the size in which the rule in memopt/rules takes them, so that ranks may
// step the same parameter in different ways.
bool whole_step(const Table&, const Group&, const Tensor&, const Prepared&, int threads, Total total, const Begun* begun);

// 0, or 1: there was no memory, 2: `total` failed, 3: `unseen`, and a gradient may not be finite. 1 and 3: nothing changed.
int step(const Table&, const Group*, Tensor*, int64_t count, uint32_t seed, int threads, Total total, bool unseen);
// 0: all gradients are finite, 2: some are not, 1: there was no memory and nobody has looked.
int look(const Table&, Span*, int64_t count, bool summed, int threads);

}  // namespace memopt
