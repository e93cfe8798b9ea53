// Loads and stores of a step without its arithmetic: every array is read, and where it is to be written stored again as
// it was, chunk by chunk beside each other as a step goes through them. In how many places at once, and how the memory is
// asked ahead, is the caller's to choose: roof.py takes what is fastest. Compiled by roof.py.
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

namespace {

constexpr int64_t RUN = 64;  // chunks that a thread takes at a time

// Bytes 64 by 64 of PLACES stretches that begin `apart` bytes one after the other; each asks `ahead` bytes on, 0: nothing.
template <int PLACES, bool WRITTEN>
void stretch(char* from, int64_t nbytes, int64_t apart, int64_t ahead) {
    for (int64_t i = 0; i + 64 <= nbytes; i += 64)
        for (int k = 0; k < PLACES; k++) {
            char* const at = from + k * apart + i;
            if (ahead) __builtin_prefetch(at + ahead, 0, 3);
            vector x = *reinterpret_cast<const vector*>(at);
            asm volatile("" : "+v"(x));  // it might be another number
            if (WRITTEN) *reinterpret_cast<vector*>(at) = x;
        }
}

// Chunks first ... last - 1; what PLACES do not divide is left to one place.
template <int PLACES>
void run(const Array* arrays, int32_t count, int64_t chunks, int64_t first, int64_t last, int64_t ahead) {
    const int64_t part = (last - first) / PLACES;
    for (int64_t c = 0; c < part; c++)
        for (int32_t a = 0; a < count; a++) {
            const int64_t nbytes = arrays[a].nbytes / chunks;
            char* const from = arrays[a].data + (first + c) * nbytes;
            if (arrays[a].written) stretch<PLACES, true>(from, nbytes, part * nbytes, ahead * nbytes);
            else stretch<PLACES, false>(from, nbytes, part * nbytes, ahead * nbytes);
        }
    if (PLACES > 1) run<1>(arrays, count, chunks, first + part * PLACES, last, ahead);
}

}  // namespace

// `places` is 1 or 4, `ahead` in chunks.
extern "C" void memopt_roof(const Array* arrays, int32_t count, int64_t chunks, int32_t threads, int32_t places,
                            int64_t ahead) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t first; (first = next.fetch_add(RUN)) < chunks;)
            (places == 4 ? run<4> : run<1>)(arrays, count, chunks, first, first + RUN < chunks ? first + RUN : chunks, ahead);
    };
    std::vector<std::thread> others;
    for (int32_t i = 1; i < threads; i++) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
}
