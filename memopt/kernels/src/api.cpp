// The C ABI.
#include <cstdlib>

#include "pool.h"
#include "passes/whole.h"

#define API extern "C" __attribute__((visibility("default")))

extern void memopt_baseline(memopt::Table&);
#if defined(__x86_64__)
extern void memopt_avx2(memopt::Table&);
extern void memopt_avx512(memopt::Table&);
#endif

namespace {

using namespace memopt;

Table tables[3];
int table_count = 0;

// Once, when the library is loaded; the best set last.
__attribute__((constructor)) void choose() {
    memopt_baseline(tables[table_count++]);
#if defined(__x86_64__)
    __builtin_cpu_init();
    // Every CPU with AVX2 has F16C, whose name clang's builtin does not know.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        memopt_avx2(tables[table_count++]);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && table_count == 2)
        memopt_avx512(tables[table_count++]);
#endif
}

const Table& chosen(int isa) { return tables[isa >= 0 && isa < table_count ? isa : table_count - 1]; }

}  // namespace

API int32_t memopt_abi_version() { return ABI_VERSION; }
API int32_t memopt_struct_size(int32_t which) {
    return static_cast<int32_t>(which == 0 ? sizeof(Group) : which == 1 ? sizeof(Tensor) : sizeof(Span));
}
API int32_t memopt_isa_count() { return table_count; }
API const char* memopt_isa_name(int32_t isa) { return chosen(isa).name; }

// One step of `count` tensors; isa -1 is the best there is; `total` is null where all rows of every tensor are here.
// `unseen`: nobody has looked at the gradients. Returns 0, 1 if there was no memory and nothing changed, 2 if `total`
// failed, or 3 if nobody has looked at the gradients and some may not be finite: nothing changed.
API int32_t memopt_step(const Group* groups, Tensor* tensors, int64_t count, uint32_t seed, int32_t threads,
                        int32_t isa, Total total, int32_t unseen) {
    return step(chosen(isa), groups, tensors, count, seed, threads, total, unseen != 0);
}

// Sets `bad` of every span that holds a NaN or an Inf, and where `summed` is not 0 `squares` of all. Returns 0 if all are
// finite, 2 if some are not, 1 if there was no memory for it.
API int32_t memopt_look(Span* spans, int64_t count, int32_t summed, int32_t threads, int32_t isa) {
    return look(chosen(isa), spans, count, summed != 0, threads);
}
