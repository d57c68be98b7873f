/* Products of bf16 matrices that add up in fp32, and the vector functions between them, for AVX-512 bf16.
 *
 * The right-hand matrix is packed: panels of COLUMNS output columns, in each two inputs of every column side by side. */
#pragma once
#include <immintrin.h>

#include "elements.h"

enum { COLUMNS = 32, MOST_ROWS = 12 };
/* What a product does with its sums: write them, add them to what is there, or write silu(first half) * second half of
 * each panel as bf16. */
enum { STORE, ADD, GATE };

static inline long padded(long n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }
static inline long least(long a, long b) { return a < b ? a : b; }
static inline long most(long a, long b) { return a > b ? a : b; }

/* e^x for x <= 0; NaN stays NaN. */
static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    const __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f),
                                     _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
    __m512 y = _mm512_fmadd_ps(r, _mm512_set1_ps(8.33333333e-3f), _mm512_set1_ps(4.16666667e-2f));
    y = _mm512_fmadd_ps(r, y, _mm512_set1_ps(1.66666667e-1f));
    y = _mm512_fmadd_ps(r, y, _mm512_set1_ps(0.5f));
    y = _mm512_fmadd_ps(r, y, _mm512_set1_ps(1.0f));
    y = _mm512_fmadd_ps(r, y, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

static inline __m512 widen16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

static inline __m512 load16(const element *x) { return widen16(_mm256_loadu_si256((const __m256i *)x)); }

static inline __m256i narrow16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline void store16(element *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, narrow16(x)); }

static inline __mmask16 lanes(long num) { return num >= 16 ? 0xffff : num <= 0 ? 0 : (__mmask16)((1 << num) - 1); }

/* x / (1 + e^-x), without an overflow on either side. */
static inline __m512 silu16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mul_ps(_mm512_div_ps(_mm512_mask_mov_ps(one, negative, e), _mm512_add_ps(one, e)), x);
}

/* out[R x 32] = a[R x 2 pairs] times one packed panel. If it `asks`, the next panel is on its way from memory meanwhile;
 * asking past the end is no access. */
static inline __attribute__((always_inline)) void tile(const element *a, long a_stride, const element *panel,
                                                       long pairs, const float *bias, const int how, const int asks,
                                                       void *out, long out_stride, const int R) {
    __m512 left[MOST_ROWS], right[MOST_ROWS];
    for (int r = 0; r < R; r++) left[r] = right[r] = _mm512_setzero_ps();
    for (long p = 0; p < pairs; p++) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + p * 64);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + p * 64 + 32);
        if (asks) {
            _mm_prefetch((const char *)(panel + (pairs + p) * 64), _MM_HINT_T1);
            _mm_prefetch((const char *)(panel + (pairs + p) * 64 + 32), _MM_HINT_T1);
        }
        for (int r = 0; r < R; r++) {
            int32_t two;
            memcpy(&two, a + r * a_stride + 2 * p, sizeof two);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            left[r] = _mm512_dpbf16_ps(left[r], both, b0);
            right[r] = _mm512_dpbf16_ps(right[r], both, b1);
        }
    }
    for (int r = 0; r < R; r++) {
        if (bias) {
            left[r] = _mm512_add_ps(left[r], _mm512_loadu_ps(bias));
            right[r] = _mm512_add_ps(right[r], _mm512_loadu_ps(bias + 16));
        }
        if (how == GATE) {
            store16((element *)out + r * out_stride, _mm512_mul_ps(silu16(left[r]), right[r]));
            continue;
        }
        float *to = (float *)out + r * out_stride;
        if (how == ADD) {
            left[r] = _mm512_add_ps(left[r], _mm512_loadu_ps(to));
            right[r] = _mm512_add_ps(right[r], _mm512_loadu_ps(to + 16));
        }
        _mm512_storeu_ps(to, left[r]);
        _mm512_storeu_ps(to + 16, right[r]);
    }
}

/* a[rows x inner] times the panels [from, to) of W^T, into their columns of `out`: of 32 floats each, or of GATE 16
 * elements. `inner` is even. */
static inline __attribute__((always_inline)) void multiply(const element *a, long a_stride, const element *packed,
                                                           long inner, const float *bias, const int how, void *out,
                                                           long out_stride, long rows, long from, long to) {
    const long pairs = inner / 2;
    for (long n = from; n < to; n++) {
        const element *panel = packed + n * pairs * 64;
        const float *own = bias ? bias + n * COLUMNS : 0;
        char *column = (char *)out + n * (how == GATE ? 16 * sizeof(element) : COLUMNS * sizeof(float));
        const size_t width = (size_t)out_stride * (how == GATE ? sizeof(element) : sizeof(float));
#define TILE_AT(r, R, asks) \
    tile(a + (r) * a_stride, a_stride, panel, pairs, own, how, asks, column + (r) * width, out_stride, R)
        long r = 0;
        if (rows >= MOST_ROWS) TILE_AT(0, MOST_ROWS, 1);
        if (rows >= MOST_ROWS) r = MOST_ROWS;
        for (; r + MOST_ROWS <= rows; r += MOST_ROWS) TILE_AT(r, MOST_ROWS, 0);
        switch (rows - r) {
#define CASE(R) \
    case R: TILE_AT(r, R, 1); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
#undef CASE
#undef TILE_AT
        default: break;
        }
    }
}

static __attribute__((noinline)) void product(const element *a, long a_stride, const element *packed, long inner,
                                              const float *bias, float *out, long out_stride, long rows, long from,
                                              long to) {
    multiply(a, a_stride, packed, inner, bias, STORE, out, out_stride, rows, from, to);
}

static __attribute__((noinline)) void product_added(const element *a, long a_stride, const element *packed, long inner,
                                                    const float *bias, float *out, long out_stride, long rows,
                                                    long from, long to) {
    multiply(a, a_stride, packed, inner, bias, ADD, out, out_stride, rows, from, to);
}

static __attribute__((noinline)) void product_gated(const element *a, long a_stride, const element *packed, long inner,
                                                    const float *bias, element *out, long out_stride, long rows,
                                                    long from, long to) {
    multiply(a, a_stride, packed, inner, bias, GATE, out, out_stride, rows, from, to);
}

/* 1 / sqrt(mean square + eps) of n numbers. */
static inline float inverse_size(const float *x, long n, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < n; i += 16) {
        const __m512 some = _mm512_maskz_loadu_ps(lanes(n - i), x + i);
        sum = _mm512_fmadd_ps(some, some, sum);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)n + eps);
}

/* RMSNorm of n numbers, a multiple of 32, to bf16. */
static inline void norm(const float *x, const float *weight, long n, float eps, element *out) {
    const __m512 scale = _mm512_set1_ps(inverse_size(x, n, eps));
    for (long i = 0; i < n; i += 16)
        store16(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i)));
}
