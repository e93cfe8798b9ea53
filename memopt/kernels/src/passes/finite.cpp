// All gradients looked at in one call, cut into equal pieces, the last first: the step that follows begins with the
// first, which are in the cache then.
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "pool.h"
#include "passes/whole.h"

namespace memopt {
namespace {

constexpr int64_t PIECE = 1 << 17;  // elements

struct Job {
    const Table* table;
    Span* spans;
    int64_t* before;  // pieces before each span
    double* sums;     // of the squares of each piece; null where they are not asked for
    int64_t count, tasks;
    std::atomic<bool> bad{false};
};

int64_t pieces(const Span& span) { return span.idle ? 0 : (span.numel + PIECE - 1) / PIECE; }

// Whether a piece is finite; the sum of its squares where there is a place for it.
bool look(const Table& table, const Span& span, int64_t piece, double* sum) {
    const int64_t begin = piece * PIECE, left = span.numel - begin, n = left < PIECE ? left : PIECE;
    const char* data = static_cast<const char*>(span.data) + begin * (span.dtype == F32 ? 4 : 2);
    return sum ? std::isfinite(*sum = table.squares(data, n, span.dtype)) : table.all_finite(data, n, span.dtype);
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
        if (!look(*job.table, job.spans[i], at - job.before[i], job.sums ? job.sums + at : nullptr)) {
            __atomic_store_n(&job.spans[i].bad, uint8_t{1}, __ATOMIC_RELAXED);
            job.bad.store(true, std::memory_order_relaxed);
        }
    }
}

}  // namespace

// Sums of a span's pieces are added in order: they do not depend on the number of threads.
int look(const Table& table, Span* spans, int64_t count, bool summed, int threads) {
    Job job{&table, spans, static_cast<int64_t*>(std::malloc((count + 1) * sizeof(int64_t))), nullptr, count, 0, {}};
    if (!job.before) return 1;
    job.before[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        spans[i].bad = 0;
        spans[i].squares = 0;
        job.before[i + 1] = job.before[i] + pieces(spans[i]);
    }
    const int64_t total = job.before[count];
    if (summed) job.sums = static_cast<double*>(std::malloc((total + 1) * sizeof(double)));
    const bool room = !summed || job.sums;
    if (room) {
        job.tasks = (total + RUN - 1) / RUN;
        parallel(threads, job.tasks, run_task, &job);
        for (int64_t i = 0; summed && i < count; i++)
            for (int64_t at = job.before[i]; at < job.before[i + 1]; at++) spans[i].squares += job.sums[at];
    }
    std::free(job.sums);
    std::free(job.before);
    return !room ? 1 : job.bad.load() ? 2 : 0;
}

}  // namespace memopt
