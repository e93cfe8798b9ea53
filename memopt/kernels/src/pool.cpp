// Work runs on torch's own threads where torch runs on GNU OpenMP, whose one entry point is looked up in the process:
// they are awake already, and a second pool would have to share the cores with them while they wait for torch's next
// operation, which they do by spinning. Everywhere else (another OpenMP, none, a child of fork(), in which OpenMP's
// threads are gone) there is a pool of our own. Its threads are made at first use, sleep between calls (after a spin of
// some tens of microseconds, because the passes of one step follow each other closely), and block all signals. A child
// of fork() begins with none and makes its own.
#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <cfenv>
#include <new>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define RELAX() _mm_pause()
#elif defined(__aarch64__)
#define RELAX() asm volatile("yield")
#else
#define RELAX() (void)0
#endif

namespace memopt {
namespace {

constexpr int MAX_HELPERS = 255, SPINS = 2000;

struct Pool {
    pthread_mutex_t calls = PTHREAD_MUTEX_INITIALIZER;  // one call at a time
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;   // guards what follows
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;
    int helpers = 0;              // threads that exist
    int seats = 0, inside = 0;    // how many may still join the job, how many are in it
    Task task = nullptr;
    void* context = nullptr;
    int64_t tasks = 0;
    fenv_t environment;           // the caller's rounding and denormal modes, which torch.set_flush_denormal changes
    std::atomic<int64_t> next{0};
    std::atomic<uint64_t> jobs{0};
};

// Never destroyed: threads sleep on it when the process ends. Made anew in a forked child, whose copy of the locks may
// be held by threads that do not exist there.
alignas(Pool) unsigned char memory[sizeof(Pool)];
Pool* pool = nullptr;

// void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags), part of libgomp's ABI: calls the
// function once on each thread of a team of at most `threads`, the caller being one of them.
typedef void (*Team)(void (*)(void*), void*, unsigned, unsigned);
Team team = nullptr;
bool sought = false, forked = false;
thread_local bool own = false;

void after_fork() {
    new (memory) Pool;
    forked = true;
}

// When the library is loaded: a fork may come before the first step.
__attribute__((constructor)) void begin() {
    pool = new (memory) Pool;
    pthread_atfork(nullptr, nullptr, after_fork);
}

Team openmp() {
#if !defined(__SANITIZE_THREAD__)  // which does not see how OpenMP's threads are synchronised
    if (!sought) {
        team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        sought = true;
    }
#endif
    return forked || own ? nullptr : team;
}

void work(Pool& p, Task task, void* context, int64_t tasks) {
    for (int64_t i; (i = p.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i);
}

void* helper(void*) {
    Pool& p = *pool;
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && p.jobs.load(std::memory_order_relaxed) == seen; i++) RELAX();
        pthread_mutex_lock(&p.lock);
        while (p.jobs.load(std::memory_order_relaxed) == seen) pthread_cond_wait(&p.wake, &p.lock);
        seen = p.jobs.load(std::memory_order_relaxed);
        if (p.seats == 0) {  // late, or not asked for
            pthread_mutex_unlock(&p.lock);
            continue;
        }
        p.seats--;
        p.inside++;
        const Task task = p.task;
        void* const context = p.context;
        const int64_t tasks = p.tasks;
        std::fesetenv(&p.environment);
        pthread_mutex_unlock(&p.lock);
        work(p, task, context, tasks);
        pthread_mutex_lock(&p.lock);
        if (--p.inside == 0) pthread_cond_signal(&p.left);
        pthread_mutex_unlock(&p.lock);
    }
    return nullptr;
}

void grow(Pool& p, int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (p.helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, helper, nullptr)) break;  // fewer threads give the same result
        pthread_detach(thread);
        p.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

struct Shared {
    Task task;
    void* context;
    int64_t tasks;
    fenv_t environment;
    std::atomic<int64_t> next;
};

void member(void* argument) {
    Shared& job = *static_cast<Shared*>(argument);
    fenv_t before;
    std::fegetenv(&before);
    std::fesetenv(&job.environment);
    for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) job.task(job.context, i);
    std::fesetenv(&before);
}

}  // namespace

OwnThreads::OwnThreads(bool wanted) : before(own) { own = own || wanted; }
OwnThreads::~OwnThreads() { own = before; }

void parallel(int threads, int64_t tasks, Task task, void* context) {
    int wanted = threads - 1 < MAX_HELPERS ? threads - 1 : MAX_HELPERS;
    if (wanted > tasks - 1) wanted = static_cast<int>(tasks - 1);
    if (wanted <= 0) {
        for (int64_t i = 0; i < tasks; i++) task(context, i);
        return;
    }
    if (const Team run = openmp()) {
        Shared job{task, context, tasks, {}, {0}};
        std::fegetenv(&job.environment);
        run(member, &job, static_cast<unsigned>(wanted) + 1, 0);
        return;
    }
    Pool& p = *pool;
    pthread_mutex_lock(&p.calls);
    pthread_mutex_lock(&p.lock);
    if (p.helpers < wanted) grow(p, wanted);
    p.task = task;
    p.context = context;
    p.tasks = tasks;
    p.seats = wanted;
    std::fegetenv(&p.environment);
    p.next.store(0, std::memory_order_relaxed);
    p.jobs.fetch_add(1, std::memory_order_relaxed);
    pthread_cond_broadcast(&p.wake);
    pthread_mutex_unlock(&p.lock);
    work(p, task, context, tasks);
    pthread_mutex_lock(&p.lock);
    p.seats = 0;  // nobody joins any more; wait for those who did
    while (p.inside) pthread_cond_wait(&p.left, &p.lock);
    pthread_mutex_unlock(&p.lock);
    pthread_mutex_unlock(&p.calls);
}

}  // namespace memopt
