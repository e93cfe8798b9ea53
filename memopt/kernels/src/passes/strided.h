// Elements of a tensor that is not contiguous, a run of them in the tensor's own order, brought together and put back.
#pragma once
#include "abi.h"

namespace {

// Calls each(from, stride, count) for the runs along the last dimension that make up elements offset ... offset + n - 1;
// `from` is where a run begins, in elements from the tensor's first.
template <class Each>
void along_runs(const int64_t* sizes, const int64_t* strides, int dims, int64_t offset, int64_t n, const Each& each) {
    const int64_t last = sizes[dims - 1];
    for (int64_t done = 0; done < n;) {
        int64_t rest = offset + done, from = 0, length = last;
        for (int d = dims - 1; d >= 0; d--) {
            const int64_t index = rest % sizes[d];
            from += index * strides[d];
            if (d == dims - 1) length -= index;
            rest /= sizes[d];
        }
        if (length > n - done) length = n - done;
        each(from, strides[dims - 1], length);
        done += length;
    }
}

template <class T>
void gather_as(const void* base, const memopt::Tensor& t, const int64_t* strides, int64_t offset, int n, void* out) {
    T* to = static_cast<T*>(out);
    along_runs(t.layout, strides, t.dims, offset, n, [&](int64_t from, int64_t stride, int64_t length) {
        const T* at = static_cast<const T*>(base) + from;
        for (int64_t i = 0; i < length; i++) *to++ = at[i * stride];
    });
}

template <class T>
void scatter_as(const void* values, const memopt::Tensor& t, const int64_t* strides, int64_t offset, int n, void* base) {
    const T* from = static_cast<const T*>(values);
    along_runs(t.layout, strides, t.dims, offset, n, [&](int64_t place, int64_t stride, int64_t length) {
        T* to = static_cast<T*>(base) + place;
        for (int64_t i = 0; i < length; i++) to[i * stride] = *from++;
    });
}

inline const int64_t* strides_of_p(const memopt::Tensor& t) { return t.layout + t.dims; }
inline const int64_t* strides_of_g(const memopt::Tensor& t) { return t.layout + 2 * t.dims; }

__attribute__((noinline)) void gather(const void* base, const memopt::Tensor& t, const int64_t* strides, uint8_t dtype,
                                      int64_t offset, int n, void* out) {
    if (dtype == memopt::F32) gather_as<uint32_t>(base, t, strides, offset, n, out);
    else gather_as<uint16_t>(base, t, strides, offset, n, out);
}

__attribute__((noinline)) void scatter(const void* values, const memopt::Tensor& t, const int64_t* strides,
                                       uint8_t dtype, int64_t offset, int n, void* base) {
    if (dtype == memopt::F32) scatter_as<uint32_t>(values, t, strides, offset, n, base);
    else scatter_as<uint16_t>(values, t, strides, offset, n, base);
}

}  // namespace
