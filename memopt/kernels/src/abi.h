// What crosses the border between Python and C++: plain structs, mirrored field by field in memopt/kernels/abi.py.
#pragma once
#include <cstdint>

namespace memopt {

// Changed whenever a struct, an enum or the meaning of a field changes; Python refuses a library with another number.
constexpr int32_t ABI_VERSION = 9;

enum Dtype : uint8_t { F32, BF16, F16 };
enum Rule : int32_t { ADAM, LION, SGD, RMSPROP, RADAM, ADAFACTOR, CAME, ADABOUND, ADEMAMIX, ADAMMINI, LAMB, STABLEADAMW, MUON, SINKGD, PRODIGY };
// How the moments of one tensor are kept: all in one format, or FACTORED: the non-negative ones as row and column means,
// the others in fp32. Where each has its own (Tensor::formats) they are MIXED, and MIXED_FACTORED with factored ones among
// them. FACTORED_8 and FACTORED_4, of one matrix: the others in 8 or 4 bits.
enum Format : uint8_t {
    FMT_32BIT, FMT_BF16, FMT_8BIT, FMT_FP8, FMT_4BIT, FMT_FACTORED,
    FMT_MIXED, FMT_MIXED_FACTORED, FMT_FACTORED_8, FMT_FACTORED_4,
    FORMATS
};
constexpr bool is_factored(uint8_t format) { return format == FMT_FACTORED || format >= FMT_MIXED_FACTORED; }

// What stands beside a 16-bit parameter (memopt/masters); parameters in fp32 are ROUNDED.
enum Master : uint8_t { ROUNDED, FP32_COPY, KAHAN, STOCHASTIC, SPLIT, SPLIT16 };

enum Flag : uint32_t {
    MAXIMIZE = 1,
    AMSGRAD = 2,
    DECOUPLED = 4,        // weight decay multiplies the parameter; otherwise it is an L2 term in the gradient
    NESTEROV = 8,
    CENTERED = 16,
    MOMENTUM = 32,        // the rule keeps its signed moment; of MUON the pass before the products, p being the update
    TRANSFORMERS = 64,    // Adafactor's convention
    SCALE_PARAMETER = 128,
    RELATIVE_STEP = 256,
    WARMUP_INIT = 512,
    SLICED_SUMS = 2048,   // PRODIGY: two moments are of every eleventh element
};

// The hyperparameters of one param group, as Python has them: fp64, before any are combined with the step.
struct Group {
    int32_t rule;
    uint32_t flags;
    double lr, weight_decay, beta1, beta2, beta3, eps, eps2, d, momentum, dampening;  // d: MUON's factor of the rate
    double final_lr, peak, gamma;             // AdaBound; peak: the rate that final_lr belongs to, 0: this one
    double alpha, alpha_steps, beta3_steps;   // AdEMAMix; 0 steps: from the first on
    double slow_steps, slow_rate;             // of a rule inside lookahead(); 0 steps: it is not
    double iterations, power_iterations;      // SinkGD
    double d0, corrected, safeguard;          // Prodigy, whose estimate is `d` and whose b3 is `beta3`; the last two 0 or 1
    double gradient_scale;                    // what gradients are multiplied by, and rounded to their dtype; 1: nothing
};

// Moments have fixed places: 0 the second moment, 1 the signed moment, 2 what else is not negative (the largest
// second moment, CAME's residual), RMSprop's centre, which is only ever kept in fp32, AdEMAMix's slow mean or the way
// that Prodigy has gone, 3 Prodigy's sum of gradients.
constexpr int SLOTS = 4;

// Columns that are decoded, stepped and encoded at a time, and the unit in which work is shared out: a multiple of
// every block, small enough for the first-level cache.
constexpr int CHUNK = 1024;
constexpr int64_t chunks_of(int64_t cols) { return (cols + CHUNK - 1) / CHUNK; }

// One tensor of one step. rows, cols: the view of memopt/core/rows.py, of the rows held here; for FACTORED all
// dimensions but the last, and the last. A flat tensor has a ragged last row; numel says where it ends.
struct Tensor {
    void* p;
    const void* g;
    void* data[SLOTS];    // the moment, its codes, or its row means; null where the rule has none
    void* aux[SLOTS];     // scales, or column means
    void* kept;           // what the master keeps, or null
    // Of a parameter or gradient that is not contiguous: its sizes, then the parameter's strides, then the gradient's, all
    // of them `dims` elements long; null where both are contiguous.
    const int64_t* layout;
    float* slow;          // the slow weights of a rule inside lookahead(), or null
    mutable double reported[2];  // PRODIGY, out: what is summed over all parameters
    float* counter;       // number of steps taken so far, incremented here; null: `step` is this step's number
    int64_t step;
    int64_t rows, cols, numel;
    int64_t first_row;    // of the whole parameter, for the random bits
    int64_t height;       // FACTORED, SINKGD: rows of one matrix that are here
    int64_t whole_numel, whole_height;  // of the whole parameter, whose other rows may be on other ranks
    int64_t span;         // ADAMMINI: elements that share one number of its second moment; factored moments, SINKGD: of a line
    int64_t whole_cols;   // columns in the view of memopt/core/rows.py, in which blocks lie, and every eleventh element is counted
    uint32_t index;       // of the parameter, for the random bits
    uint32_t group;
    uint8_t order[SLOTS]; // the moment's place in the rule's own order, for the random bits
    uint8_t formats[SLOTS];  // of each moment: one of the first six
    uint8_t format, p_dtype, g_dtype;
    uint8_t dims;
    uint8_t stacked;      // FACTORED, SINKGD: matrices of a stack, even where one of them is held here
    uint8_t cut;          // rows may be on several ranks: no sum may depend on where they are cut
    uint8_t master;       // of masters with random bits rows and cols are those of the parameter in every format
    uint8_t idle;         // it has no gradient in this step, and stays as it is
};

// Adds n numbers up over the ranks that share the rows of the tensors of a step, in place. Returns 0, or another number
// where that failed: the step ends there.
typedef int32_t (*Total)(double* numbers, int64_t n);

// One gradient to be looked at.
struct Span {
    const void* data;
    int64_t numel;
    double squares;       // out, where asked for: the sum of the squares of its elements
    uint8_t dtype;
    uint8_t idle;         // it is not there: not looked at
    uint8_t bad;          // out: 1 if it holds a NaN or an Inf
};

}  // namespace memopt
