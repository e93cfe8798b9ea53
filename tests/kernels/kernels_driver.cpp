// Every rule on every format over exactly allocated memory, on one thread and on four, whose results must be the same
// bytes; then once more in a forked child. Built with a sanitizer by test_kernels_sanitizers.py.
//
//     driver PART PARTS    every PARTS-th case, from PART on
//
// ONE_TABLE: with the baseline's instructions only.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../memopt/kernels/src/table.h"

using namespace memopt;

#ifdef ONE_TABLE
void memopt_baseline(Table&);
void memopt_avx2(Table& table) { memopt_baseline(table); }
void memopt_avx512(Table& table) { memopt_baseline(table); }
constexpr bool one_table = true;
#else
constexpr bool one_table = false;
#endif

extern "C" int32_t memopt_isa_count();
extern "C" const char* memopt_isa_name(int32_t);
extern "C" int32_t memopt_step(const Group*, Tensor*, int64_t, uint32_t, int32_t threads, int32_t isa, Total, int32_t unseen);
extern "C" int32_t memopt_look(Span*, int64_t, int32_t summed, int32_t threads, int32_t isa);

namespace {

// Heap blocks of exactly the size asked for: a read or write past the end is an error that a sanitizer sees.
struct Memory {
    std::vector<std::pair<unsigned char*, size_t>> blocks;
    void* make(size_t bytes) {
        unsigned char* block = static_cast<unsigned char*>(std::calloc(bytes ? bytes : 1, 1));
        blocks.push_back({block, bytes});
        return block;
    }
    std::vector<unsigned char> image() const {
        std::vector<unsigned char> all;
        for (auto& [block, bytes] : blocks) all.insert(all.end(), block, block + bytes);
        return all;
    }
    ~Memory() {
        for (auto& [block, bytes] : blocks) std::free(block);
    }
};

void fill(void* to, int64_t n, uint8_t dtype, uint32_t seed) {
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        float x = (static_cast<int32_t>(seed) >> 8) * 0x1p-23f;
        if (dtype == F32) static_cast<float*>(to)[i] = x;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (dtype == BF16) static_cast<uint16_t*>(to)[i] = bits >> 16;
        if (dtype == F16) static_cast<uint16_t*>(to)[i] = (bits >> 31 << 15) | (0x3800 + (seed & 0x3FF));
    }
}

struct Shape { int64_t rows, cols, numel, height, span; };

// The format of one moment where a tensor's is `format`: memopt/kernels/pack.py, with one pair for each way in which
// formats stand together.
uint8_t format_of(uint8_t format, int slot, int rule) {
    const bool is_signed = slot == 1 || slot == 3 || (slot == 2 && (rule == ADEMAMIX || rule == PRODIGY));
    switch (format) {
        case FMT_FACTORED: return is_signed ? FMT_32BIT : FMT_FACTORED;
        case FMT_MIXED: return slot == 1 ? FMT_BF16 : slot == 2 ? FMT_4BIT : FMT_8BIT;
        case FMT_MIXED_FACTORED: return is_signed ? FMT_FP8 : FMT_FACTORED;
        case FMT_FACTORED_8: return is_signed ? FMT_8BIT : FMT_FACTORED;
        case FMT_FACTORED_4: return is_signed ? FMT_4BIT : FMT_FACTORED;
        default: return format;
    }
}

// What one rule has of a parameter. Of a stack `shape` has the lines of all matrices; where moments in blocks stand
// beside factored ones its rows are matrices, as in memopt/core/rows.py.
Tensor make(Memory& memory, const Shape& shape, Format format, uint8_t dtype, uint32_t index, Master master, int rule, bool sliced) {
    Tensor t{};
    const int64_t n = shape.numel, size = dtype == F32 ? 4 : 2;
    t.p = memory.make(n * size);
    void* g = memory.make(n * size);
    fill(t.p, n, dtype, index);
    fill(g, n, dtype, index + 100);
    t.g = g;
    t.stacked = shape.height != shape.rows;
    const bool by_matrix = format == FMT_MIXED_FACTORED && t.stacked && n;
    t.rows = by_matrix ? shape.rows / shape.height : shape.rows;
    t.cols = by_matrix ? shape.height * shape.cols : shape.cols;
    t.whole_cols = t.cols, t.numel = n, t.height = shape.height, t.index = index;
    t.whole_numel = n, t.whole_height = shape.height;
    t.format = format, t.p_dtype = t.g_dtype = dtype, t.span = is_factored(format) || rule == SINKGD ? shape.cols : shape.span;
    t.slow = static_cast<float*>(memory.make(4 * n));
    const int beside[] = {0, 4, 2, 0, 1, 2};  // bytes of one element of what each master keeps
    t.master = dtype == F32 ? ROUNDED : master;
    if (beside[t.master]) t.kept = memory.make(n * beside[t.master]);
    for (int slot = 0; slot < SLOTS; slot++) {
        t.order[slot] = slot;
        const uint8_t kept = t.formats[slot] = format_of(format, slot, rule);
        const int64_t block = kept == FMT_4BIT ? 128 : 256;
        const bool flat = shape.cols == 256 && n % 256;
        const int64_t blocks = flat ? (n + block - 1) / block : t.rows * ((t.cols + block - 1) / block);
        if (rule == ADAMMINI && slot == 0) t.data[slot] = memory.make(4 * ((n + shape.span - 1) / shape.span));
        else if (sliced && slot >= 2) t.data[slot] = memory.make(4 * t.rows * ((t.cols + 10) / 11));
        else if (kept == FMT_32BIT) t.data[slot] = memory.make(4 * n);
        else if (kept == FMT_BF16) t.data[slot] = memory.make(2 * n);
        else if (kept == FMT_FACTORED) t.data[slot] = memory.make(4 * shape.rows), t.aux[slot] = memory.make(4 * shape.rows / shape.height * shape.cols);
        else {
            t.data[slot] = memory.make(kept != FMT_4BIT ? n : flat ? (n + 1) / 2 : t.rows * ((t.cols + 1) / 2));
            t.aux[slot] = memory.make(4 * blocks);
        }
    }
    return t;
}

int32_t alone(double*, int64_t) { return 0; }  // the sum over one rank

std::vector<unsigned char> run(int rule, uint32_t flags, Format format, int threads, int isa, Master master = ROUNDED, bool looks_ahead = false, bool cut = false) {
    // The last two are stepped by all threads together where a rule needs sums: one tall, one wide.
    const Shape shapes[] = {{7, 70, 490, 7, 70}, {5, 1030, 5150, 5, 1030}, {12, 65, 780, 4, 13}, {1, 1, 1, 1, 1}, {0, 9, 0, 1, 9},
                            {180, 190, 34200, 180, 190}, {24, 4200, 100800, 24, 88200}};
    const Shape flat[] = {{20, 256, 5000, 20, 256}, {1, 256, 3, 1, 256}};
    Memory memory;
    std::vector<Tensor> tensors;
    uint32_t index = 1;
    for (const Shape& shape : shapes) {
        if (format >= FMT_FACTORED_8 && shape.height != shape.rows) continue;  // stacks are FMT_MIXED_FACTORED
        tensors.push_back(make(memory, shape, format, index % 3, index, master, rule, flags & SLICED_SUMS)), index++;
    }
    if (!is_factored(format) && rule != SINKGD)
        for (const Shape& shape : flat) tensors.push_back(make(memory, shape, format, index % 3, index, master, rule, flags & SLICED_SUMS)), index++;
    Group group{rule, flags, 1e-2, 0.1, 0.9, 0.99, 0.999, 1e-8, 1e-3, 1.0, 0.9, 0.0, 0.1, 0, 1e-3, 5, 9, 9, 0, 0, 3, 2, 1e-3, 1, 0, 0.5};
    if (looks_ahead) group.slow_steps = 1, group.slow_rate = 0.5;
    for (Tensor& t : tensors) t.step = looks_ahead ? 1 : 3, t.cut = cut;
    if (rule == ADAFACTOR) group.beta2 = -0.8;
    std::vector<Span> spans;
    for (Tensor& t : tensors) spans.push_back({t.g, t.numel, 0, t.g_dtype, t.idle, 0});
    for (int summed = 0; summed < 2; summed++)
        if (memopt_look(spans.data(), spans.size(), summed, threads, isa)) std::exit(3);
    const auto step = [&](bool unseen) {
        return memopt_step(&group, tensors.data(), tensors.size(), 5, threads, isa, cut ? alone : nullptr, unseen);
    };
    tensors[1].idle = true;
    if (step(false)) std::exit(4);
    tensors[1].idle = false;
    if (step(true) != (cut ? 3 : 0) || (cut && step(false))) std::exit(4);  // ranks do not leave the look to it
    // A NaN is found, and nothing has changed.
    Tensor& bad = tensors[(rule + format) % tensors.size()];
    if (cut || !bad.numel) return memory.image();
    std::memset(static_cast<char*>(const_cast<void*>(bad.g)) + (bad.numel - 1) * (bad.g_dtype == F32 ? 4 : 2), 0xFF, bad.g_dtype == F32 ? 4 : 2);
    const auto before = memory.image();
    if (step(true) != 3 || before != memory.image()) std::exit(6);
    return memory.image();
}

int part = 0, parts = 1, cases = 0;
bool mine() { return cases++ % parts == part; }

bool all(int isa) {
    bool same = true;
    const struct { int rule; uint32_t flags; } rules[] = {
        {ADAM, DECOUPLED}, {ADAM, AMSGRAD}, {LION, 0}, {SGD, 0}, {SGD, MOMENTUM}, {RMSPROP, 0}, {RMSPROP, MOMENTUM},
        {RMSPROP, CENTERED | MOMENTUM}, {RADAM, 0}, {ADAFACTOR, SCALE_PARAMETER}, {ADAFACTOR, MOMENTUM | TRANSFORMERS}, {CAME, 0},
        {ADABOUND, 0}, {ADEMAMIX, DECOUPLED}, {ADAMMINI, DECOUPLED}, {LAMB, DECOUPLED}, {STABLEADAMW, DECOUPLED},
        {SINKGD, DECOUPLED}, {PRODIGY, DECOUPLED}, {PRODIGY, SLICED_SUMS},
    };
    for (auto [rule, flags] : rules)
        for (int f = 0; f < FORMATS; f++) {
            const bool one_kind = rule == LION || rule == SGD || rule == ADAMMINI;
            if ((flags & CENTERED || rule == SINKGD) && f != FMT_32BIT) continue;
            if ((is_factored(f) && flags & AMSGRAD) || (f >= FMT_FACTORED && one_kind) || !mine()) continue;
            const auto one = run(rule, flags, static_cast<Format>(f), 1, isa), four = run(rule, flags, static_cast<Format>(f), 4, isa);
            if (one != four) std::printf("rule %d flags %u format %d isa %d: threads change the result\n", rule, flags, f, isa), same = false;
            const auto cut = run(rule, flags, static_cast<Format>(f), 1, isa, ROUNDED, false, true);
            if (cut != run(rule, flags, static_cast<Format>(f), 4, isa, ROUNDED, false, true))
                std::printf("rule %d flags %u format %d isa %d: threads change what ranks share\n", rule, flags, f, isa), same = false;
        }
    for (int m = FP32_COPY; m <= SPLIT16; m++)
        for (int rule : {ADAM, SGD, ADAFACTOR, LAMB})
            for (Format f : {FMT_32BIT, FMT_8BIT, FMT_FACTORED, FMT_MIXED_FACTORED, FMT_FACTORED_8}) {
                if ((rule == SGD && is_factored(f)) || !mine()) continue;
                const auto master = static_cast<Master>(m);
                const auto one = run(rule, 0, f, 1, isa, master, true), four = run(rule, 0, f, 4, isa, master, true);
                if (one != four) std::printf("master %d rule %d format %d isa %d: threads change the result\n", m, rule, f, isa), same = false;
            }
    return same;
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 3) part = std::atoi(arguments[1]), parts = std::atoi(arguments[2]);
    bool same = true;
    for (int isa = 0; isa < (one_table ? 1 : memopt_isa_count()); isa++) same = all(isa) && same;
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        const bool good = run(ADAM, DECOUPLED, FMT_8BIT, 1, 0) == run(ADAM, DECOUPLED, FMT_8BIT, 2, 0);
        _exit(good ? 0 : 5);
    }
    int status = 1;
    waitpid(child, &status, 0);
    std::puts(same && status == 0 ? "same" : "different");
    return same && status == 0 ? 0 : 1;
}
