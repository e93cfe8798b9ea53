// Every rule on every format, for one instruction set. Compiled once per set, with its flags and
// -DMEMOPT_TABLE=<name of the table>; everything else in here is private to the file, so that no function compiled for
// one set can be linked into another.
#include "passes/chunk.h"
#include "passes/finite.h"
#include "passes/prodigy.h"
#include "passes/sinkgd.h"

#define STRING_(x) #x
#define STRING(x) STRING_(x)

namespace {

template <template <bool> class Rule>
void fill(memopt::Run* row) {
    row[memopt::FMT_32BIT] = run<Rule<false>, In32>;
    row[memopt::FMT_BF16] = run<Rule<false>, InHalf>;
    row[memopt::FMT_8BIT] = run<Rule<false>, In8>;
    row[memopt::FMT_FP8] = run<Rule<false>, InFp8>;
    row[memopt::FMT_4BIT] = run<Rule<false>, In4>;
    row[memopt::FMT_FACTORED] = run<Rule<true>, InFactors>;
    row[memopt::FMT_MIXED] = run<Rule<false>, InMixture>;
    for (int f = memopt::FMT_MIXED_FACTORED; f < memopt::FORMATS; f++) row[f] = run<Rule<true>, InMixture>;
}

void fill_adammini(memopt::Run* row) {
    row[memopt::FMT_32BIT] = run<Adam<true, false>, BesideRowMeans<In32>>;
    row[memopt::FMT_BF16] = run<Adam<true, false>, BesideRowMeans<InHalf>>;
    row[memopt::FMT_8BIT] = run<Adam<true, false>, BesideRowMeans<In8>>;
    row[memopt::FMT_FP8] = run<Adam<true, false>, BesideRowMeans<InFp8>>;
    row[memopt::FMT_4BIT] = run<Adam<true, false>, BesideRowMeans<In4>>;
}

void inverse_roots(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = 1.0f / __builtin_sqrtf(x[i]);
}

template <bool F> using AdamStep = Adam<F, false>;
template <bool F> using AdamCoded = Adam<F, false, true>;
template <bool F> using AdamMaxStep = Adam<F, true>;
template <bool F> using SgdMomentum = Sgd<F, true>;
template <bool F> using RmspropStep = Rmsprop<F, false, false>;
template <bool F> using RmspropMomentum = Rmsprop<F, true, false>;
template <bool F> using AdafactorStep = Adafactor<F, false>;
template <bool F> using AdafactorMomentum = Adafactor<F, true>;
template <bool F> using CameStep = Came<F, true>;
template <bool F> using CameVector = Came<F, false>;
template <bool F> using SumOfUpdate = SumUpdate<F, false>;
template <bool F> using SumOfBoth = SumUpdate<F, true>;

}  // namespace

// A function and not a constant: nothing of this file may run before the CPU is known to have its instructions.
extern void MEMOPT_TABLE(memopt::Table&);
void MEMOPT_TABLE(memopt::Table& t) {
    using namespace memopt;
    t.name = STRING(MEMOPT_TABLE);
    t.all_finite = all_finite;
    t.squares = squares;
    t.inverse_roots = inverse_roots;
    fill<AdamStep>(t.run[STEP_ADAM]);
    t.run[STEP_ADAM][FMT_8BIT] = run<AdamCoded<false>, In8>;
    t.run[STEP_ADAM][FMT_FP8] = run<AdamCoded<false>, InFp8>;
    t.run[STEP_ADAM][FMT_4BIT] = run<AdamCoded<false>, In4>;
    t.run[STEP_ADAM][FMT_FACTORED_8] = run<AdamCoded<true>, BesideFactors<Signed8>>;
    t.run[STEP_ADAM][FMT_FACTORED_4] = run<AdamCoded<true>, BesideFactors<Signed4>>;
    fill<AdamMaxStep>(t.run[STEP_ADAM_MAX]);
    fill<Lion>(t.run[STEP_LION]);
    fill<SgdMomentum>(t.run[STEP_SGD_MOMENTUM]);
    fill<RmspropStep>(t.run[STEP_RMSPROP]);
    fill<RmspropMomentum>(t.run[STEP_RMSPROP_MOMENTUM]);
    fill<AdafactorStep>(t.run[STEP_ADAFACTOR]);
    fill<AdafactorMomentum>(t.run[STEP_ADAFACTOR_MOMENTUM]);
    fill<CameStep>(t.run[STEP_CAME]);
    fill<CameVector>(t.run[STEP_CAME_VECTOR]);
    fill<Adabound>(t.run[STEP_ADABOUND]);
    fill<Ademamix>(t.run[STEP_ADEMAMIX]);
    fill_adammini(t.run[STEP_ADAMMINI]);
    fill<SumOfUpdate>(t.run[SUM_UPDATE]);
    fill<SumOfBoth>(t.run[SUM_UPDATE_PARAMETER]);
    fill<SumLamb>(t.run[SUM_LAMB]);
    fill<SumSurprise>(t.run[SUM_SURPRISE]);
    t.run[STEP_RMSPROP_CENTERED][FMT_32BIT] = run<Rmsprop<false, false, true>, In32>;
    t.run[STEP_RMSPROP_CENTERED_MOMENTUM][FMT_32BIT] = run<Rmsprop<false, true, true>, In32>;
    // New means are found line by line of the matrices, without the other moments but for CAME's.
    for (int f = 0; f < FORMATS; f++) {
        if (!is_factored(f)) continue;
        t.run[MEANS_ADAM][f] = run<MeansAdam, InFactors>;
        t.run[MEANS_RMSPROP][f] = run<MeansRmsprop, InFactors>;
        t.run[MEANS_ADAFACTOR][f] = run<MeansAdafactor, InFactors>;
        t.run[COLUMNS_OF_UPDATE][f] = run<ColumnsOfUpdate, ByRows>;
        t.run[MEANS_RESIDUAL][f] = run<MeansResidual<false>, BesideFactors<Anywhere>>;
    }
    t.run[MEANS_RESIDUAL_WRITING][FMT_FACTORED] = run<MeansResidual<true>, InFactors>;
    t.run[STEP_CAME_WRITTEN][FMT_FACTORED] = run<CameWritten, InFactors>;
    for (int f = FMT_FACTORED_8; f <= FMT_FACTORED_4; f++) {  // of one matrix, without the first moment
        t.run[SUM_UPDATE][f] = t.run[SUM_UPDATE][FMT_FACTORED];
        t.run[SUM_UPDATE_PARAMETER][f] = t.run[SUM_UPDATE_PARAMETER][FMT_FACTORED];
        t.run[SUM_SURPRISE][f] = t.run[SUM_SURPRISE][FMT_FACTORED];
    }
    t.run[STEP_MUON_UPDATE][FMT_32BIT] = run<MuonUpdate, In32>;
    t.run[STEP_MUON_UPDATE][FMT_BF16] = run<MuonUpdate, InHalf>;
    t.run[STEP_MUON_UPDATE][FMT_8BIT] = run<MuonUpdate, In8>;
    t.run[STEP_MUON_UPDATE][FMT_FP8] = run<MuonUpdate, InFp8>;
    t.run[STEP_MUON_UPDATE][FMT_4BIT] = run<MuonUpdate, In4>;
    fill_sinkgd(t);
    fill<ProdigyWhole>(t.run[STEP_PRODIGY]);
    fill_prodigy_sliced(t.run[STEP_PRODIGY_SLICED]);
    for (int f = 0; f < FORMATS; f++) {  // without moments the format does not matter
        t.run[STEP_MUON_APPLY][f] = run<MuonApply, In32>;
        t.run[STEP_SGD][f] = run<Sgd<false, false>, In32>;
        t.run[SUM_PARAMETER][f] = run<SumParameter, In32>;
        t.run[SUM_GRADIENT][f] = run<SumGradient, In32>;
    }
}
