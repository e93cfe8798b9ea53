// Threads that wait between steps. Work is handed out task by task, so results must not depend on who does what.
#pragma once
#include <cstdint>

namespace memopt {

typedef void (*Task)(void* context, int64_t task);

// Runs task 0 ... tasks - 1 on up to `threads` threads, the caller being one of them; returns when all are done.
void parallel(int threads, int64_t tasks, Task task, void* context);

// While it lives, what the calling thread runs in parallel runs on threads of our own: for a thread that comes and goes
// OpenMP would make a team that does too.
class OwnThreads {
    const bool before;

  public:
    explicit OwnThreads(bool wanted);
    ~OwnThreads();
};

}  // namespace memopt
