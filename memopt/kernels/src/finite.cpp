// All gradients looked at in one call, cut into equal pieces, the last first: the step that follows begins with the
// first, which are in the cache then.
#include <atomic>
#include <cstdlib>

#include "pool.h"
#include "whole.h"

namespace memopt {
namespace {

constexpr int64_t PIECE = 1 << 17;  // elements

struct Job {
    const Table* table;
    Span* spans;
    int64_t* before;  // pieces before each span
    int64_t count, tasks;
    std::atomic<bool> bad{false};
};

int64_t pieces(const Span& span) { return (span.numel + PIECE - 1) / PIECE; }

bool look(const Table& table, const Span& span, int64_t piece) {
    const int64_t begin = piece * PIECE, left = span.numel - begin;
    const char* data = static_cast<const char*>(span.data) + begin * (span.dtype == F32 ? 4 : 2);
    return table.all_finite(data, left < PIECE ? left : PIECE, span.dtype);
}

// A task is a run of pieces: at least one of a large span, or many small spans.
constexpr int64_t RUN = 4;

void run_task(void* context, int64_t task) {
    Job& job = *static_cast<Job*>(context);
    int64_t low = 0, high = job.count;
    const int64_t first = (job.tasks - 1 - task) * RUN;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (job.before[middle] <= first ? low : high) = middle;
    }
    const int64_t total = job.before[job.count], last = first + RUN < total ? first + RUN : total;
    int64_t i = low;
    for (int64_t at = first; at < last; at++) {
        while (job.before[i + 1] <= at) i++;
        if (!look(*job.table, job.spans[i], at - job.before[i])) {
            __atomic_store_n(&job.spans[i].bad, uint8_t{1}, __ATOMIC_RELAXED);
            job.bad.store(true, std::memory_order_relaxed);
        }
    }
}

}  // namespace

bool finite(const Table& table, Span* spans, int64_t count, int threads) {
    Job job{&table, spans, static_cast<int64_t*>(std::malloc((count + 1) * sizeof(int64_t))), count, 0, {}};
    if (!job.before) {  // without memory for a plan, one after the other
        bool good = true;
        for (int64_t i = 0; i < count; i++) {
            spans[i].bad = !table.all_finite(spans[i].data, spans[i].numel, spans[i].dtype);
            good = good && !spans[i].bad;
        }
        return good;
    }
    job.before[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        spans[i].bad = 0;
        job.before[i + 1] = job.before[i] + pieces(spans[i]);
    }
    job.tasks = (job.before[count] + RUN - 1) / RUN;
    parallel(threads, job.tasks, run_task, &job);
    std::free(job.before);
    return !job.bad.load();
}

}  // namespace memopt
