// Loads and stores of a step without its arithmetic: every array is read, and where it is to be written stored again as
// it was, chunk by chunk beside each other as a step goes through them. The memory is asked ahead as the kernels ask it:
// for every line in a pass that only reads, else for the first of each chunk. Compiled by roof.py.
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));

struct Array {
    char* data;
    int64_t nbytes;
    int32_t written;
};

extern "C" void memopt_roof(const Array* arrays, int32_t count, int64_t chunks, int32_t threads) {
    constexpr int64_t RUN = 64;  // chunks that a thread takes at a time
    bool reads = true;
    for (int32_t a = 0; a < count; a++) reads = reads && !arrays[a].written;
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t first; (first = next.fetch_add(RUN)) < chunks;)
            for (int64_t c = first; c < chunks && c < first + RUN; c++)
                for (int32_t a = 0; a < count; a++) {
                    const int64_t nbytes = arrays[a].nbytes / chunks;
                    char* const from = arrays[a].data + c * nbytes;
                    const bool written = arrays[a].written;
                    for (int64_t i = 0; i + 64 <= nbytes; i += 64) {
                        if (reads || i == 0) __builtin_prefetch(from + 2 * nbytes + i, 0, 2);
                        vector x = *reinterpret_cast<const vector*>(from + i);
                        asm volatile("" : "+v"(x));  // it might be another number
                        if (written) *reinterpret_cast<vector*>(from + i) = x;
                    }
                }
    };
    std::vector<std::thread> others;
    for (int32_t i = 1; i < threads; i++) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
}
