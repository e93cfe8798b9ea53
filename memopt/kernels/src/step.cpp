// The step of a list of tensors. Rules that look at each element alone are one pass: all tensors are cut into chunks
// of at most 1024 columns and equal runs of chunks are the tasks, whatever the sizes. Rules that need statistics of a whole
// tensor (whole.cpp) run large tensors one after the other on all threads, and small ones each on one thread.
#include <cstdlib>

#include "pool.h"
#include "scalars.h"
#include "passes/whole.h"

namespace memopt {
namespace {

constexpr uint32_t GOLDEN = 0x9E3779B9u;
constexpr uint32_t MASTER_ORDER = 255;  // its place among a rule's moments, for the random bits

uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}
uint32_t fold(uint32_t key, uint32_t word) { return mix(key ^ (word + GOLDEN)); }

// Of memopt/core/dither.py.
uint32_t shuffled(uint32_t step, uint32_t count) {
    const uint32_t last = count - 1;
    const uint32_t drawn = mix(step / count + GOLDEN);
    uint32_t i = ((step ^ drawn) * (drawn >> 8 | 1)) & last;
    i ^= i >> 1;
    i = ((i ^ drawn >> 16) * (drawn >> 24 | 1)) & last;
    return step - (step & last) + i;
}

// Element-wise rules: the one pass; -1 for the others.
int single_pass(const Group& h, const Tensor& t) {
    switch (h.rule) {
        case ADAM:
        case RADAM:
            return is_factored(t.format) ? -1 : h.flags & AMSGRAD ? STEP_ADAM_MAX : STEP_ADAM;
        case LION:
            return STEP_LION;
        case SGD:
            return h.flags & MOMENTUM ? STEP_SGD_MOMENTUM : STEP_SGD;
        case MUON:
            return h.flags & MOMENTUM ? STEP_MUON_UPDATE : STEP_MUON_APPLY;
        case RMSPROP:
            if (is_factored(t.format)) return -1;
            if (h.flags & CENTERED) return h.flags & MOMENTUM ? STEP_RMSPROP_CENTERED_MOMENTUM : STEP_RMSPROP_CENTERED;
            return h.flags & MOMENTUM ? STEP_RMSPROP_MOMENTUM : STEP_RMSPROP;
        case ADABOUND:
            return is_factored(t.format) ? -1 : STEP_ADABOUND;
        case ADEMAMIX:
            return is_factored(t.format) ? -1 : STEP_ADEMAMIX;
        default:
            return -1;
    }
}

struct Job {
    const Table* table;
    const Group* groups;
    const Tensor* tensors;
    Prepared* prepared;
    int64_t count, small_count, grain, chunks;
    int64_t* small;   // tensors that one thread runs through all passes
    int64_t* before;  // chunks of element-wise tensors before each tensor; count + 1 of them
    Begun* begun;     // of each tensor; null where gradients were looked at before
    bool* finite;     // of each small tensor
};

void element_wise(const Job& job, int64_t first, int64_t last) {
    int64_t low = 0, high = job.count;  // the last tensor that begins at or before `first`
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (job.before[middle] <= first ? low : high) = middle;
    }
    for (int64_t i = low; first < last; i++) {
        const int64_t stop = job.before[i + 1] < last ? job.before[i + 1] : last;
        if (stop <= first) continue;
        const Tensor& t = job.tensors[i];
        const Prepared& ready = job.prepared[i];
        Sums sums{};
        job.table->run[ready.pass][t.format](t, *ready.scalars, ready.keys, first - job.before[i],
                                             stop - job.before[i], sums);
        first = stop;
    }
}

void run_task(void* context, int64_t task) {
    const Job& job = *static_cast<Job*>(context);
    if (task < job.small_count) {
        const int64_t i = job.small[task];
        whole_step(*job.table, job.groups[job.tensors[i].group], job.tensors[i], job.prepared[i], 1, nullptr,
                   job.begun ? job.begun + i : nullptr);
        return;
    }
    const int64_t first = (task - job.small_count) * job.grain;
    element_wise(job, first, first + job.grain < job.chunks ? first + job.grain : job.chunks);
}

void begin_task(void* context, int64_t task) {
    const Job& job = *static_cast<Job*>(context);
    const int64_t i = job.small[task];
    const Tensor& t = job.tensors[i];
    job.finite[i] = begin(*job.table, job.groups[t.group], t, job.prepared[i], 1, job.begun[i]);
}

// Memory for what `all_finite` needs and keeps; false if there is none.
bool make_room(Job& job, Span*& spans, float*& before) {
    int64_t floats = 0;
    for (int64_t i = 0; i < job.count; i++) {
        const Tensor& t = job.tensors[i];
        if (!t.idle && t.numel && job.prepared[i].pass < 0) floats += floats_to_keep(job.groups[t.group], t);
    }
    spans = static_cast<Span*>(std::malloc((job.count + 1) * sizeof(Span)));
    before = static_cast<float*>(std::malloc((floats + 1) * sizeof(float)));
    job.begun = static_cast<Begun*>(std::malloc((job.count + 1) * sizeof(Begun)));
    job.finite = static_cast<bool*>(std::malloc(job.count + 1));
    return spans && before && job.begun && job.finite;
}

// Makes the first passes of all tensors, and looks at the gradients of those that are stepped in one. Returns whether
// all gradients are finite for certain; where they are not, nothing has changed.
bool all_finite(Job& job, Span* spans, float* before, int threads) {
    int64_t few = 0, looked_at = 0;
    bool finite = true;
    for (int64_t i = 0; i < job.count; i++) {
        const Tensor& t = job.tensors[i];
        job.begun[i] = {{0, 0}, before, false};
        if (t.idle || !t.numel) continue;
        if (job.prepared[i].pass >= 0 || !shows_what_is_not_finite(job.groups[t.group], t)) {
            spans[looked_at++] = {t.g, t.numel, 0, t.g_dtype, 0, 0};
            continue;
        }
        before += floats_to_keep(job.groups[t.group], t);
        if (t.numel < LARGE) job.small[few++] = i;
        else finite = begin(*job.table, job.groups[t.group], t, job.prepared[i], threads, job.begun[i]) && finite;
    }
    parallel(threads, few, begin_task, &job);
    for (int64_t k = 0; k < few; k++) finite = finite && job.finite[job.small[k]];
    finite = finite && (!looked_at || look(*job.table, spans, looked_at, false, threads) == 0);
    for (int64_t i = 0; !finite && i < job.count; i++) undo(job.groups[job.tensors[i].group], job.tensors[i], job.begun[i]);
    return finite;
}

// Scalars are shared by the tensors of a group that are at the same step, which is nearly always all of them.
struct Shared {
    Scalars scalars;
    int64_t step;
    uint32_t group;
};

}  // namespace

int step(const Table& table, const Group* groups, Tensor* tensors, int64_t count, uint32_t seed, int threads,
         Total total, bool unseen) {
    const OwnThreads apart(total != nullptr);  // called from a thread for each parameter (memopt/partitions/batched_allreduce.py)
    Job job{&table, groups, tensors, nullptr, count, 0, 1, 0, nullptr, nullptr, nullptr, nullptr};
    job.prepared = static_cast<Prepared*>(std::malloc((count + 1) * sizeof(Prepared)));
    job.small = static_cast<int64_t*>(std::malloc((count + 1) * sizeof(int64_t)));
    job.before = static_cast<int64_t*>(std::malloc((count + 1) * sizeof(int64_t)));
    Shared* shared = static_cast<Shared*>(std::malloc((count + 1) * sizeof(Shared)));
    Span* spans = nullptr;
    float* before = nullptr;
    bool room = job.prepared && job.small && job.before && shared;
    int64_t kinds = 0;
    const uint32_t seeded = fold(0, seed);
    for (int64_t i = 0; room && i < count; i++) {
        Tensor& t = tensors[i];
        Prepared& ready = job.prepared[i];
        job.before[i] = job.chunks;
        if (t.idle) continue;
        const int64_t now = t.counter ? static_cast<int64_t>(*t.counter + 1) : t.step;
        int64_t k = kinds;
        while (k > 0 && k > kinds - 8 && (shared[k - 1].group != t.group || shared[k - 1].step != now)) k--;
        if (k == 0 || k <= kinds - 8) {
            shared[kinds] = {make_scalars(groups[t.group], now), now, t.group};
            k = ++kinds;
        }
        ready.scalars = &shared[k - 1].scalars;
        ready.step = now;
        const uint32_t stem = fold(seeded, t.index);
        for (int slot = 0; slot < SLOTS; slot++) ready.keys[slot] = fold(stem, t.order[slot]);
        ready.keys[SLOTS] = static_cast<uint32_t>(now) * GOLDEN;
        ready.keys[SLOTS + 1] = fold(stem, MASTER_ORDER);
        ready.keys[SLOTS + 2] = shuffled(static_cast<uint32_t>(now), 8) * GOLDEN;
        ready.keys[SLOTS + 3] = shuffled(static_cast<uint32_t>(now), 4) * GOLDEN;
        ready.pass = single_pass(groups[t.group], t);
        if (ready.pass >= 0) job.chunks += t.numel ? t.rows * chunks_of(t.cols) : 0;
    }
    bool seen = true;
    if (room && unseen) room = make_room(job, spans, before);
    if (room && unseen) seen = !total && all_finite(job, spans, before, threads);
    for (int64_t i = 0; room && seen && i < count; i++)
        if (tensors[i].counter && !tensors[i].idle) *tensors[i].counter += 1;
    bool going = room && seen;
    if (going) {
        job.before[count] = job.chunks;
        for (int64_t i = 0; going && i < count; i++) {
            // A rank without rows of a parameter takes part in the sums over its ranks.
            if (tensors[i].idle || job.prepared[i].pass >= 0 || !(total ? tensors[i].whole_numel : tensors[i].numel)) continue;
            if (!total && tensors[i].numel < LARGE) job.small[job.small_count++] = i;
            else
                going = whole_step(table, groups[tensors[i].group], tensors[i], job.prepared[i], threads, total,
                                   job.begun ? job.begun + i : nullptr);
        }
    }
    if (going) {
        // Runs short enough for every thread to get several, long enough to stream.
        const int64_t share = job.chunks / (static_cast<int64_t>(threads) * 8);
        job.grain = share < 4 ? 4 : share > 64 ? 64 : share;
        parallel(threads, job.small_count + (job.chunks + job.grain - 1) / job.grain, run_task, &job);
    }
    std::free(job.prepared);
    std::free(job.small);
    std::free(job.before);
    std::free(shared);
    std::free(job.begun);
    std::free(job.finite);
    std::free(spans);
    std::free(before);
    return !room ? 1 : !seen ? 3 : going ? 0 : 2;
}

}  // namespace memopt
