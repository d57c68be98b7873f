/* The products of a layer's projections, forward and backward: bf16 numbers, fp32 sums, weights and their gradients in
 * fp32 as the optimiser has them.
 *
 * native.py compiles this with the machine's own C compiler; without AVX-512 bf16 `products_supported` says no. No two
 * threads write the same number and sums are taken in a fixed order: results do not depend on the number of threads.
 */
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include "bf16_products.h"

enum { BAND = 16 * ROWS }; /* rows that stay near while the panels of the weights pass */

int products_supported(int threads) { return threads > 0; }

/* One tile, rounded to bf16, to its place in C, whose last rows and columns may be missing. */
static inline void multiply_rounded(const uint32_t *const a[ROWS], const uint32_t *panel, long pairs, const float *bias,
                                    bf16 *c, long stride, long rows, long columns) {
    float tile[ROWS * PANEL];
    multiply(a, 1, panel, pairs, tile, PANEL, 0);
    for (long i = 0; i < columns; i += 16) {
        const long left = columns - i;
        const __mmask16 here = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
        const __m512 more = bias ? _mm512_maskz_loadu_ps(here, bias + i) : _mm512_setzero_ps();
        for (long r = 0; r < rows; r++) {
            const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(tile + r * PANEL + i), more);
            _mm256_mask_storeu_epi16(c + r * stride + i, here, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

/* out[N][F] = x[N][k] times the packed panels, plus bias (or none). */
static void multiply_rows(const bf16 *x, const uint32_t *packed, const float *bias, bf16 *out, long N, long k, long F,
                          int threads) {
    const long panels = panels_of(F), pairs = k / 2, bands = (N + BAND - 1) / BAND;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (long band = 0; band < bands; band++)
        for (long panel = 0; panel < panels; panel++)
            for (long n = band * BAND; n < least(N, band * BAND + BAND); n += ROWS) {
                const uint32_t *rows[ROWS];
                for (int r = 0; r < ROWS; r++) rows[r] = (const uint32_t *)(x + least(n + r, N - 1) * k);
                multiply_rounded(rows, packed + panel * pairs * PANEL, pairs, bias ? bias + panel * PANEL : 0,
                                 out + n * F + panel * PANEL, F, least(ROWS, N - n), least(PANEL, F - panel * PANEL));
            }
}

/* out[N][F] = x[N][D] weight[F][D]^T + bias. D is even. All return 0, or 1 without memory. */
int project_rows(const bf16 *x, const float *weight, const float *bias, bf16 *out, long N, long D, long F,
                 int threads) {
    const long panels = panels_of(F), pairs = D / 2;
    uint32_t *packed = kept_words((size_t)(panels * pairs * PANEL));
    if (!packed) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long i = 0; i < panels; i++)
        pack_turned_rows(weight, 1, D, D, F, i * PANEL, PANEL, packed + i * pairs * PANEL);
    multiply_rows(x, packed, bias, out, N, D, F, threads);
    return 0;
}

/* out[N][D] = grad[N][F] weight[F][D]. F is even. */
int pull_back_rows(const bf16 *grad, const float *weight, bf16 *out, long N, long D, long F, int threads) {
    const long panels = panels_of(D), pairs = F / 2;
    uint32_t *packed = kept_words((size_t)(panels * pairs * PANEL));
    if (!packed) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long i = 0; i < panels; i++)
        pack_float_rows(weight, D, F, D, i * PANEL, packed + i * pairs * PANEL);
    multiply_rows(grad, packed, 0, out, N, F, D, threads);
    return 0;
}

/* out[F][D] (+)= sum over rows of grad[n][F] x[n][D]; sums[F] (or none) (+)= sum over rows of grad[n][F]. */
int project_gradient(const bf16 *grad, const bf16 *x, float *out, float *sums, long N, long D, long F, int add,
                     int threads) {
    if (sum_over_tokens(grad, F, x, D, out, N, F, D, add, threads)) return 1;
    if (!sums) return 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long i = 0; i < F; i += 16) {
        const __mmask16 here = F - i >= 16 ? 0xffff : (__mmask16)((1u << (F - i)) - 1);
        __m512 sum = add ? _mm512_maskz_loadu_ps(here, sums + i) : _mm512_setzero_ps();
        for (long n = 0; n < N; n++) {
            const __m512i word = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, grad + n * F + i));
            sum = _mm512_add_ps(sum, (__m512)_mm512_slli_epi32(word, 16));
        }
        _mm512_mask_storeu_ps(sums + i, here, sum);
    }
    return 0;
}
#else
int products_supported(int threads) { return 0 * threads; }
#endif
