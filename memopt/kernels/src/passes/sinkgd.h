// SinkGD's passes over the rows of a matrix: along each row and then, with what the row has given, down the columns. While
// a few rows are read from memory, those before them go down the columns from the cache: one read of the gradient.
#pragma once
#include "passes/chunk.h"

namespace {

// Half as many lanes, and these in fp64: what a conversion makes of one load.
constexpr int H = W / 2;
typedef float hf __attribute__((vector_size(4 * H)));
typedef double hd __attribute__((vector_size(8 * H)));

INLINE hd fused(hd a, hd b, hd c) {
#if LANES_512
    return _mm512_fmadd_pd(a, b, c);
#elif LANES_256
    return _mm256_fmadd_pd(a, b, c);
#else
    return a * b + c;
#endif
}

// Rows that go along or down together; rows whose columns are summed in fp32, if no rank may cut between them.
constexpr int TOGETHER = 4, FLUSH = 16;

// Of a gradient whose elements lie apart, widened to fp32.
__attribute__((noinline)) void brought_together(const memopt::Tensor& t, int64_t offset, int n, float* to) {
    alignas(64) float together[CHUNK];
    gather(t.g, t, strides_of_g(t), t.g_dtype, offset, n, together);
    const float* from = load_numbers(together, n, t.g_dtype, to);
    if (from != to) std::memcpy(to, from, 4 * n);
}

// Elements offset ... offset + n - 1 of the gradient as fp32, from where they lie or in `buffer`, zeros behind them up to
// a whole vector.
INLINE const float* gradient(const memopt::Tensor& t, const Scalars& s, int64_t offset, int n, float* buffer) {
    const void* lies = element(const_cast<void*>(t.g), offset, t.g_dtype);
    const bool apart = __builtin_expect(t.layout != nullptr, 0);
    if (!apart && !s.scaled && t.g_dtype == memopt::F32 && n % W == 0) return static_cast<const float*>(lies);
    const float* g = buffer;
    if (apart) brought_together(t, offset, n, buffer);
    else g = load_numbers(lies, n, t.g_dtype, buffer);
    if (g != buffer) std::memcpy(buffer, g, 4 * n);
    for (int i = n; i % W; i++) buffer[i] = 0;
    return s.scaled ? scaled(buffer, n, t.g_dtype, s.gradient_scale, buffer) : buffer;
}

// Rows r ... r + ROWS - 1, if there are any: what they have on their way, as fp32.
template <int ROWS>
struct Rows {
    alignas(64) float buffer[ROWS][CHUNK];
    const float* g[ROWS];

    INLINE_METHOD void open(const memopt::Tensor& t, const Scalars& s, int64_t r, int64_t c, int n) {
        for (int q = 0; q < ROWS; q++) g[q] = gradient(t, s, (r + q) * t.cols + c, n, buffer[q]);
    }
};

// Adds to the sums of W columns what one row has there, x: in fp64.
INLINE void add_exactly(double* sums, vf x, float k) {
    alignas(64) float lanes[W];
    store(lanes, x);
    for (int h = 0; h < W; h += H) {
        const hd wide = __builtin_convertvector(load<hf>(lanes + h), hd);
        store(sums + h, fused(wide, k - hd{}, load<hd>(sums + h)));
    }
}

// Two things beside each other, because the first waits for the memory and the second does not: the sums of x * y along
// ROWS rows from `next` on, and x * k of the ROWS rows from `last` on, which were along before, added to the sums of the
// columns. SQUARES: of x² instead of x. EXACT: to `sums`, else to `few`. A row that is negative is none.
template <bool SQUARES, bool EXACT, int ROWS>
void sweep_rows(const memopt::Tensor& t, const Scalars& s, int64_t last, int64_t next, const float* y, const float* k,
                double* dots, double* sums, float* few) {
    Rows<ROWS> down, along;
    vf factor[ROWS];
    for (int q = 0; q < ROWS; q++) dots[q] = 0, factor[q] = splat(last < 0 ? 0.0f : k[q]);
    for (int64_t c = 0; c < t.cols; c += CHUNK) {
        const int n = static_cast<int>(t.cols - c < CHUNK ? t.cols - c : CHUNK);
        down.open(t, s, last < 0 ? next : last, c, n);
        along.open(t, s, next < 0 ? last : next, c, n);
        vf dot[ROWS] = {};
        for (int i = 0; i < n; i += W) {
            const vf weight = loadf(y + c + i);
            vf sum = EXACT ? vf{} : loadf(few + c + i);
            for (int q = 0; q < ROWS; q++) {
                const vf x = loadf(along.g[q] + i), z = loadf(down.g[q] + i);
                dot[q] = fma(SQUARES ? x * x : x, weight, dot[q]);
                if (EXACT) add_exactly(sums + c + i, SQUARES ? z * z : z, last < 0 ? 0.0f : k[q]);
                else sum = fma(SQUARES ? z * z : z, factor[q], sum);
            }
            if (!EXACT) store(few + c + i, sum);
        }
        for (int q = 0; q < ROWS; q++) dots[q] += sum_lanes(__builtin_convertvector(dot[q], vd));
    }
}

INLINE void flush(float* few, double* sums, int64_t n) {
    for (int64_t i = 0; i < n; i++) sums[i] += few[i], few[i] = 0;
}

// SQUARES: `row` becomes one over the mean of x² * y along each row, and x² * row is added to the sums of the columns.
// Else x * row * (sum of x * y along the row) is. y and sums have scales_of_columns(cols) numbers; so has `few`, of zeros.
template <bool SQUARES, bool EXACT>
void band_of_rows(const memopt::Tensor& t, const Scalars& s, int64_t r0, int64_t r1, const float* y, float* row,
                  double* sums, float* few) {
    const int64_t padded = memopt::scales_of_columns(t.cols);
    float k[TOGETHER];
    double dots[TOGETHER];
    const auto scale = [&](int64_t r, int rows) {
        for (int q = 0; q < rows; q++) {
            if (SQUARES) row[r + q] = memopt::reciprocal(dots[q] / static_cast<double>(t.cols));
            k[q] = SQUARES ? row[r + q] : static_cast<float>(dots[q]) * row[r + q];
        }
    };
    int64_t last = -1;
    for (int64_t r = r0; r + TOGETHER <= r1; r += TOGETHER) {
        sweep_rows<SQUARES, EXACT, TOGETHER>(t, s, last, r, y, k, dots, sums, few);
        if (!EXACT && (r - r0) % FLUSH == 0) flush(few, sums, padded);
        scale(r, TOGETHER);
        last = r;
    }
    if (last >= 0) sweep_rows<SQUARES, EXACT, TOGETHER>(t, s, last, -1, y, k, dots, sums, few);
    for (int64_t r = last < 0 ? r0 : last + TOGETHER; r < r1; r++) {
        sweep_rows<SQUARES, EXACT, 1>(t, s, -1, r, y, k, dots, sums, few);
        scale(r, 1);
        sweep_rows<SQUARES, EXACT, 1>(t, s, r, -1, y, k, dots, sums, few);
    }
    if (!EXACT) flush(few, sums, padded);
}

template <bool SQUARES>
void rows_then_columns(const memopt::Tensor& t, const Scalars& scalars, int64_t r0, int64_t r1, const float* y,
                       float* row, double* sums, float* few) {
    const Scalars s = scalars;
    if (t.cut) band_of_rows<SQUARES, true>(t, s, r0, r1, y, row, sums, few);
    else band_of_rows<SQUARES, false>(t, s, r0, r1, y, row, sums, few);
}

// What elements are multiplied by: a number of their row times one of their column.
class Scales : public Plain {
    const float* const col;
    const float row;

  public:
    INLINE_METHOD Scales(const memopt::Tensor& t, int slot, const Place& place, Scratch&, Sums&)
        : col(static_cast<const float*>(t.aux[slot]) + place.row / t.height * memopt::scales_of_columns(t.cols) + place.col),
          row(static_cast<const float*>(t.data[slot])[place.row]) {}
    INLINE_METHOD vf get(int i) const { return row * loadf(col + i); }
};
struct InScales { typedef Scales U, R; typedef Full S; };

struct Sinkgd : Reads {
    static constexpr bool V = true;
    INLINE vf apply(vf& p, vf g, vf& v, vf&, vf&, const Scalars& s) {
        p = fma(g * v, splat(-s.lr), p * s.decay);
        return vf{};
    }
};

void fill_sinkgd(memopt::Table& t) {
    t.squares_of_rows = rows_then_columns<true>;
    t.products_of_rows = rows_then_columns<false>;
    t.run[memopt::STEP_SINKGD][memopt::FMT_32BIT] = run<Sinkgd, InScales>;
}

}  // namespace
