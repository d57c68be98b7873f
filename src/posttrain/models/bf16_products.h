/* Products of bf16 matrices summed in fp32, for processors with AVX-512 bf16 (one instruction multiplies 32 pairs).
 *
 * C[m][n] = sum over k of A[m][k] B[k][n]. Pairs of k lie side by side, as one 32-bit word. B is packed in panels of
 * PANEL columns: word [k / 2][column]. A is read word by word, with any stride between rows and between pairs. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <immintrin.h>

enum { ROWS = 6, PANEL = 64 };
typedef uint16_t bf16;

static inline long pairs_of(long k) { return (k + 1) / 2; }
static inline long panels_of(long n) { return (n + PANEL - 1) / PANEL; }
static inline long least(long a, long b) { return a < b ? a : b; }

/* tile[ROWS][PANEL] = rows of A times a panel; row r begins at a[r], its words lie `step` apart. */
static inline void multiply(const uint32_t *const a[ROWS], long step, const uint32_t *panel, long pairs, float *tile,
                            long stride, int add) {
    __m512 sums[ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sums[r][c] = add ? _mm512_loadu_ps(tile + r * stride + 16 * c) : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + 16);
        const __m512bh b2 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + 32);
        const __m512bh b3 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + 48);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32((int)a[r][k * step]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, b0);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, b1);
            sums[r][2] = _mm512_dpbf16_ps(sums[r][2], x, b2);
            sums[r][3] = _mm512_dpbf16_ps(sums[r][3], x, b3);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) _mm512_storeu_ps(tile + r * stride + 16 * c, sums[r][c]);
}

/* One tile to its place in C, whose last rows and columns may be missing. */
static inline void multiply_to(const uint32_t *const a[ROWS], long step, const uint32_t *panel, long pairs, float *c,
                               long stride, long rows, long columns, int add) {
    if (rows == ROWS && columns == PANEL) {
        multiply(a, step, panel, pairs, c, stride, add);
        return;
    }
    float tile[ROWS * PANEL] = {0};
    multiply(a, step, panel, pairs, tile, PANEL, 0);
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < columns; i++) c[r * stride + i] = tile[r * PANEL + i] + (add ? c[r * stride + i] : 0.0f);
}

/* Words (x[2k][i], x[2k + 1][i]) of `width` columns of two rows, the second perhaps missing. */
static inline void zip_rows(const bf16 *first, const bf16 *second, uint32_t *to, long width) {
    if (second)
        for (long i = 0; i < width; i++) to[i] = (uint32_t)first[i] | (uint32_t)second[i] << 16;
    else
        for (long i = 0; i < width; i++) to[i] = first[i];
}

/* One panel of B from rows of k: b[k][n], at columns [column, column + PANEL). */
static inline void pack_rows(const bf16 *b, long stride, long k, long n, long column, uint32_t *panel) {
    const long width = least(PANEL, n - column);
    for (long pair = 0; pair < pairs_of(k); pair++) {
        const bf16 *first = b + 2 * pair * stride + column;
        uint32_t *to = panel + pair * PANEL;
        zip_rows(first, 2 * pair + 1 < k ? first + stride : 0, to, width);
        for (long i = width; i < PANEL; i++) to[i] = 0;
    }
}

/* One panel of B from rows of n: b[n][k], k even, at rows [column, column + PANEL). */
static inline void pack_columns(const bf16 *b, long stride, long k, long n, long column, uint32_t *panel) {
    const long width = least(PANEL, n - column), pairs = k / 2;
    for (long i = 0; i < PANEL; i++) {
        const bf16 *row = b + (column + i) * stride;
        for (long pair = 0; pair < pairs; pair++) {
            uint32_t word = 0;
            if (i < width) memcpy(&word, row + 2 * pair, sizeof word);
            panel[pair * PANEL + i] = word;
        }
    }
}
