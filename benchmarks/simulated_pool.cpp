// In the place of memopt/kernels/src/pool.cpp: the tasks of a step run one after the other and are timed, and the time that
// so many threads would take for them is what it takes when each takes the next task as soon as it has finished one. By
// the processor's time of this thread, which other processes do not change. Compiled by many_threads.py.
#include "pool.h"
#include "table.h"

#include <time.h>

#include <algorithm>
#include <vector>

namespace {

double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

double mark = 0, alone = 0, together = 0, work = 0;
int depth = 0;

}  // namespace

namespace memopt {

OwnThreads::OwnThreads(bool) : before(false) {}
OwnThreads::~OwnThreads() {}

void parallel(int threads, int64_t tasks, Task task, void* context) {
    if (depth) {  // of a tensor that one thread takes through all passes
        for (int64_t i = 0; i < tasks; i++) task(context, i);
        return;
    }
    depth++;
    alone += now() - mark;
    std::vector<double> free_at(std::max(1, std::min<int>(threads, static_cast<int>(tasks))), 0.0);
    for (int64_t i = 0; i < tasks; i++) {
        const double begin = now();
        task(context, i);
        const double took = now() - begin;
        work += took;
        *std::min_element(free_at.begin(), free_at.end()) += took;
    }
    together += *std::max_element(free_at.begin(), free_at.end());
    depth--;
    mark = now();
}

}  // namespace memopt

// One table is compiled, for the processor that it is compiled on.
void memopt_baseline(memopt::Table&);
void memopt_avx2(memopt::Table& table) { memopt_baseline(table); }
void memopt_avx512(memopt::Table& table) { memopt_baseline(table); }

extern "C" __attribute__((visibility("default"))) void memopt_simulation_begin() {
    alone = together = work = 0;
    mark = now();
}
// Seconds: between the parallel parts; in them, on so many threads; in them, on one.
extern "C" __attribute__((visibility("default"))) void memopt_simulation_end(double* out) {
    out[0] = alone + (now() - mark), out[1] = together, out[2] = work;
}
