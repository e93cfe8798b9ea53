// What one instruction set offers to the scheduler: functions that run one pass over a range of chunks of one tensor.
#pragma once
#include "abi.h"

namespace memopt {

struct Lerp {
    float weight;
    bool from_end;  // as torch.lerp: from b towards a where the weight is 0.5 or more
};

// The numbers of one step of one group, rounded to fp32 where torch rounds them.
struct Scalars {
    uint32_t gradient_sign;  // flips the gradient where the objective is maximised
    float gradient_scale;    // of a gradient that is clipped or was scaled
    bool scaled;             // gradient_scale is not 1
    float decay;             // p *= decay
    float l2;                // g += l2 * p
    bool coupled;            // l2 is not 0: asked for every vector, and a float costs a hundredth of the step there
    Lerp first, second, third;
    float beta2, one_minus_beta2;
    float inverse_bias, eps, rate, lr;
    float momentum, kept, dampening;  // kept: what SGD keeps of its buffer, 0 at the first step
    bool nesterov, plain;    // plain: RAdam's step without its second moment
    float eps_added, eps_residual, floor, ceiling;  // ceiling: 1 / sqrt(floor)
    float shrink;            // p -= p * shrink: a decay too small to be taken from 1; LAMB: the decay in its update
    float update_scale;      // known after the sum of squared updates
    float lowest, highest;   // AdaBound's rates
    float longest;           // what an element moves by at most where the second moment is factored
    float first_bias, mixed; // AdEMAMix: 1 / (1 - b1^t), and how much of the slow mean is taken; Prodigy: what its sum takes, keeps
    bool begins, returns;    // lookahead(): slow weights become the parameter, or it becomes them
    Lerp slow;
    double toward;           // Prodigy: what the inner product of gradients and ways counts
    double mean_floor;       // what a factored moment's mean is at least, where it is used
};

// Sums that a pass collects over chunks, and the means that a factored moment is divided by.
struct Sums {
    double total;       // of what the rule adds
    double squares;     // of the parameter's squares, or of the magnitudes of the fourth moment
    double row;         // of a factored moment, over the chunks of this call
    float* column;      // of a factored moment, per column from first_col on, padded to a whole chunk
    int64_t first_col;
    float mean[SLOTS];
    const float* means[SLOTS];  // of each matrix of a stack where a pass meets several of them in a row, or null
    const float* root[SLOTS];  // 1 / sqrt(column mean) from first_col on, for passes that divide by the square root
};

enum Pass {
    STEP_ADAM, STEP_ADAM_MAX, STEP_LION, STEP_SGD, STEP_SGD_MOMENTUM,
    STEP_RMSPROP, STEP_RMSPROP_MOMENTUM, STEP_RMSPROP_CENTERED, STEP_RMSPROP_CENTERED_MOMENTUM,
    STEP_ADAFACTOR, STEP_ADAFACTOR_MOMENTUM, STEP_CAME, STEP_CAME_WRITTEN, STEP_CAME_VECTOR, STEP_ADABOUND, STEP_ADEMAMIX, STEP_ADAMMINI,
    STEP_MUON_UPDATE, STEP_MUON_APPLY, STEP_SINKGD, STEP_PRODIGY, STEP_PRODIGY_SLICED,
    SUM_PARAMETER, SUM_UPDATE, SUM_UPDATE_PARAMETER, SUM_GRADIENT, SUM_LAMB, SUM_SURPRISE,  // of squares
    MEANS_ADAM, MEANS_RMSPROP, MEANS_ADAFACTOR, MEANS_RESIDUAL, MEANS_RESIDUAL_WRITING,  // of a factored moment
    COLUMNS_OF_UPDATE,
    PASSES
};

// keys: those of Place (moments.h).
typedef void (*Run)(const Tensor&, const Scalars&, const uint32_t* keys, int64_t first, int64_t last, Sums&);

// SinkGD's pass over rows r0 ... r1 - 1 of a tensor of matrices (sinkgd.h): what each row is multiplied by, and what it
// then adds to the sums of the columns. y, sums and few, which is zero before and after, have scales_of_columns(cols) numbers.
typedef void (*RowsThenColumns)(const Tensor&, const Scalars&, int64_t r0, int64_t r1, const float* y, float* row,
                                double* sums, float* few);
constexpr int64_t scales_of_columns(int64_t cols) { return (cols + 63) / 64 * 64; }
// One over a mean of squares: those that are smaller than any normal number count as that, one that is infinite has no
// scale. Static: code for one instruction set is not to be linked into another's.
static inline float reciprocal(double mean) {
    if (!(mean <= 3.4028234663852886e38)) return __builtin_nanf("");
    return static_cast<float>(1 / (mean < 0x1p-126 ? 0x1p-126 : mean));
}

struct Table {
    const char* name;
    Run run[PASSES][FORMATS];
    RowsThenColumns squares_of_rows, products_of_rows;
    void (*inverse_roots)(const float* x, float* out, int64_t n);
    bool (*all_finite)(const void* data, int64_t n, uint8_t dtype);
    double (*squares)(const void* data, int64_t n, uint8_t dtype);  // their sum; not finite where an element is not
};

}  // namespace memopt
