/* Products of bf16 matrices summed in fp32, for processors with AVX-512 bf16 (one instruction multiplies 32 pairs).
 *
 * C[m][n] = sum over k of A[m][k] B[k][n]. Pairs of k lie side by side, as one 32-bit word. B is packed in panels of
 * PANEL columns: word [k / 2][column]. A is read word by word, with any stride between rows and between pairs. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <immintrin.h>

enum { ROWS = 6, PANEL = 64 };
typedef uint16_t bf16;

/* Memory of the calling thread's own, kept from call to call: fresh memory would cost a page fault every 4 kB. NULL where
 * there is none. One user at a time. */
static uint32_t *kept_words(size_t words) {
    static _Thread_local uint32_t *kept;
    static _Thread_local size_t size;
    if (words > size) {
        free(kept);
        const size_t page = 1 << 21; /* large pages, where the system has them: rows lie kilobytes apart */
        size = (words * sizeof(uint32_t) + page - 1) / page * page / sizeof(uint32_t);
        kept = aligned_alloc(page, size * sizeof(uint32_t));
        if (!kept) size = 0;
#ifdef MADV_HUGEPAGE
        if (kept) madvise(kept, size * sizeof(uint32_t), MADV_HUGEPAGE);
#endif
    }
    return kept;
}

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
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
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
        for (int c = 0; c < 4; c++) {
            float *to = tile + r * stride + 16 * c; /* read only now: it has had time to come near */
            _mm512_storeu_ps(to, add ? _mm512_add_ps(sums[r][c], _mm512_loadu_ps(to)) : sums[r][c]);
        }
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
    for (long i = 0; i < width; i += 16) {
        const __mmask16 here = width - i >= 16 ? 0xffff : (__mmask16)((1u << (width - i)) - 1);
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, first + i));
        const __m512i high = second ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, second + i))
                                    : _mm512_setzero_si512();
        _mm512_mask_storeu_epi32(to + i, here, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
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

/* words[i][j] becomes words[j][i]: 16 x 16 of them. */
static inline void turn(__m512i w[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(w[2 * i], w[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(w[2 * i], w[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            w[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            w[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(w[i], w[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(w[i], w[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(w[8 + i], w[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(w[8 + i], w[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        w[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        w[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        w[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        w[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

/* Up to 16 words of a row, zeros behind them. */
static inline __m512i words_of(const bf16 *row, long words) {
    return _mm512_maskz_loadu_epi32(words >= 16 ? 0xffff : (__mmask16)((1u << words) - 1), row);
}

static inline __m512i words_of_floats(const float *row, long words) {
    const long numbers = 2 * words;
    const __mmask16 low = numbers >= 16 ? 0xffff : (__mmask16)((1u << numbers) - 1);
    const __mmask16 high = numbers >= 32 ? 0xffff : numbers > 16 ? (__mmask16)((1u << (numbers - 16)) - 1) : 0;
    const __m512 first = _mm512_maskz_loadu_ps(low, row), second = _mm512_maskz_loadu_ps(high, row + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

/* One panel of `wide` columns (a multiple of 16) of B from rows of n: b[n][k], k even, at rows [column, column + wide).
 * `floats`: they are fp32. */
static inline void pack_turned_rows(const void *b, int floats, long stride, long k, long n, long column, long wide,
                                    uint32_t *panel) {
    for (long block = 0; block < wide; block += 16)
        for (long pair = 0; pair < k / 2; pair += 16) {
            const long words = least(16, k / 2 - pair);
            __m512i w[16];
            for (long i = 0; i < 16; i++) {
                const long row = column + block + i, at = row * stride + 2 * pair;
                if (row >= n)
                    w[i] = _mm512_setzero_si512();
                else
                    w[i] = floats ? words_of_floats((const float *)b + at, words) : words_of((const bf16 *)b + at, words);
            }
            turn(w);
            for (long i = 0; i < words; i++) _mm512_storeu_si512(panel + (pair + i) * wide + block, w[i]);
        }
}

static inline void pack_columns(const bf16 *b, long stride, long k, long n, long column, uint32_t *panel) {
    pack_turned_rows(b, 0, stride, k, n, column, PANEL, panel);
}

/* One panel of B from fp32 rows of k, k even: b[k][n], at columns [column, column + PANEL). */
static inline void pack_float_rows(const float *b, long stride, long k, long n, long column, uint32_t *panel) {
    for (long block = 0; block < PANEL; block += 16) {
        const long left = n - column - block;
        const __mmask16 here = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        for (long pair = 0; pair < k / 2; pair++) {
            const float *first = b + 2 * pair * stride + column + block;
            const __m512 x = _mm512_maskz_loadu_ps(here, first), y = _mm512_maskz_loadu_ps(here, first + stride);
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
            const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(y));
            _mm512_storeu_si512(panel + pair * PANEL + block, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

enum {
    TOKENS = 1024, /* of a pass over tokens in a product that sums over them */
    GROUP = 8      /* tiles of rows that a thread takes at a time */
};

/* Words [k / 2][row] of pairs [pair, pair + num) for all tiles of ROWS of the m columns of a[k][m]; a tile has `room`
 * pairs. Writes two words too many behind each pair, which the next one overwrites. */
static inline void pack_turned(const bf16 *a, long stride, long k, long m, long pair, long num, long room,
                               uint32_t *tiles) {
    const long last = least(pairs_of(k), pair + num);
    for (long first = 0; first < m; first += ROWS) {
        uint32_t *to = tiles + first / ROWS * room * ROWS;
        const long width = least(8, m - first);
        const __mmask8 here = (__mmask8)((1u << width) - 1);
        for (long p = pair; p < last; p++) {
            const bf16 *row = a + 2 * p * stride + first;
            __builtin_prefetch(row + 128); /* the rows lie too far apart for the processor to foresee */
            __builtin_prefetch(row + stride + 128);
            const __m256i low = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(here, row));
            const __m256i high = 2 * p + 1 < k ? _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(here, row + stride))
                                               : _mm256_setzero_si256();
            const __m256i words = _mm256_or_si256(low, _mm256_slli_epi32(high, 16));
            _mm256_mask_storeu_epi32(to + p * ROWS, p + 1 < last ? 0xff : 0x3f, words);
        }
    }
}

/* out[O][D] (+)= sum over tokens of grad[token][O] x[token][D]. Returns 0, or 1 with nothing done. */
static inline int sum_over_tokens(const bf16 *grad, long grad_stride, const bf16 *x, long x_stride, float *out, long tokens,
                           long O, long D, int add, int threads) {
    enum { SLICE = 16 }; /* pairs whose rows are in the cache together */
    const long tiles = (O + ROWS - 1) / ROWS, panels = panels_of(D), groups = (tiles + GROUP - 1) / GROUP;
    const long most = pairs_of(least(TOKENS, tokens)), slices = (most + SLICE - 1) / SLICE;
    uint32_t *left = kept_words((size_t)(most * (tiles * ROWS + panels * PANEL) + 16));
    if (!left) return 1;
    uint32_t *right = left + (most * tiles * ROWS + 15) / 16 * 16;
    const int narrow_grad = tiles * ROWS <= panels * PANEL; /* then all of it stays near while the panels pass */
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long start = 0; start < tokens; start += TOKENS) {
        const long k = least(TOKENS, tokens - start), pairs = pairs_of(k);
#pragma omp for schedule(static)
        for (long i = 0; i < slices + panels; i++) {
            if (i < slices)
                pack_turned(grad + start * grad_stride, grad_stride, k, O, i * SLICE, SLICE, most, left);
            else
                pack_rows(x + start * x_stride, x_stride, k, D, (i - slices) * PANEL,
                          right + (i - slices) * most * PANEL);
        }
#pragma omp for schedule(static)
        for (long item = 0; item < panels * groups; item++) {
            const long panel = narrow_grad ? item / groups : item % panels;
            const long group = narrow_grad ? item % groups : item / panels, column = panel * PANEL;
            for (long tile = group * GROUP; tile < least(tiles, group * GROUP + GROUP); tile++) {
                const uint32_t *words = left + tile * most * ROWS, *rows[ROWS];
                float *to = out + tile * ROWS * D + column;
                for (int r = 0; r < ROWS; r++) {
                    rows[r] = words + r;
                    for (int c = 0; c < PANEL; c += 16) __builtin_prefetch(to + r * D + c, 1);
                }
                multiply_to(rows, ROWS, right + panel * most * PANEL, pairs, to, D, least(ROWS, O - tile * ROWS),
                            least(PANEL, D - column), add || start > 0);
            }
        }
    }
    return 0;
}
