/* From hidden states to statistics of the targets' distributions and back, a block of the vocabulary at a time.
 *
 * Products are of bf16 numbers, summed in fp32 and used as they are: no logit is rounded to bf16, and none is kept. The
 * logits of a few rows and columns are made in the cache, reduced to running sums (Milakov and Gimelshein, 1805.02867)
 * or turned into their gradient, and forgotten.
 *
 * native.py compiles this with the machine's own C compiler; without AVX-512 bf16 `head_supported` says no. No two
 * threads write the same number and sums are taken in a fixed order: results do not depend on the number of threads.
 */
#ifdef __AVX512BF16__
#define BF16
#include "bf16_products.h"
#include "lanes.h"

enum {
    BAND = 8 * ROWS, /* rows whose logits are in the cache together */
    SHEET = 4 * PANEL /* and columns */
};

int head_supported(int threads) { return threads > 0; }

/* out[O][D] (+)= sum over tokens of grad[token][O] x[token][D]. Returns 0, or 1 with nothing done. */
int weight_gradient(const bf16 *grad, long grad_stride, const bf16 *x, long x_stride, float *out, long tokens, long O,
                    long D, int add, int threads) {
    return sum_over_tokens(grad, grad_stride, x, x_stride, out, tokens, O, D, add, threads);
}

/* out[N][D] += a[N][k] b[k][D], k even */
int add_product(const bf16 *a, const bf16 *b, float *out, long N, long k, long D, int threads) {
    const long panels = panels_of(D), pairs = k / 2, bands = (N + BAND - 1) / BAND;
    uint32_t *packed = kept_words((size_t)(panels * pairs * PANEL));
    if (!packed) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (long i = 0; i < panels; i++) pack_rows(b, D, k, D, i * PANEL, packed + i * pairs * PANEL);
#pragma omp for schedule(static)
        for (long band = 0; band < bands; band++)
            for (long panel = 0; panel < panels; panel++)
                for (long n = band * BAND; n < least(N, band * BAND + BAND); n += ROWS) {
                    const uint32_t *rows[ROWS];
                    for (int r = 0; r < ROWS; r++) rows[r] = (const uint32_t *)(a + least(n + r, N - 1) * k);
                    multiply_to(rows, 1, packed + panel * pairs * PANEL, pairs, out + n * D + panel * PANEL, D,
                                least(ROWS, N - n), least(PANEL, D - panel * PANEL), 1);
                }
    }
    return 0;
}

/* What goes into the logits of a block of the vocabulary. D is even. */
typedef struct {
    const bf16 *hidden;      /* [N][D] */
    const int64_t *targets;  /* [N] */
    long N, D, first, width; /* the block's first entry, and how many */
    float sharpness;         /* 1 / temperature */
} block;

/* sheet[BAND][SHEET]: logits of rows [n, n + BAND) and columns [column, column + SHEET); those past the block's end are
 * -infinity. */
static void make_sheet(const block *b, const uint32_t *packed, long n, long column, float *sheet) {
    const long pairs = b->D / 2;
    for (long panel = column / PANEL; panel < least((column + SHEET) / PANEL, panels_of(b->width)); panel++)
        for (long r0 = 0; r0 < least(BAND, b->N - n); r0 += ROWS) {
            const uint32_t *rows[ROWS];
            for (int r = 0; r < ROWS; r++)
                rows[r] = (const uint32_t *)(b->hidden + least(n + r0 + r, b->N - 1) * b->D);
            multiply(rows, 1, packed + panel * pairs * PANEL, pairs, sheet + r0 * SHEET + panel * PANEL - column,
                     SHEET, 0);
        }
    const long here = b->width > column ? least(SHEET, b->width - column) : 0;
    for (long r = 0; r < BAND; r++) {
        for (long c = 0; c < here; c += LANES) store(sheet + r * SHEET + c, load(sheet + r * SHEET + c) * b->sharpness);
        for (long c = here; c < SHEET; c++) sheet[r * SHEET + c] = -INFINITY;
    }
}

/* Per row: the greatest logit so far, the sum of exp(z - top), the sum of (z - top) exp(z - top), the target's logit. */
typedef struct {
    float *top, *sum, *spread, *target;
} state;

static void reduce_row(const float *row, long width, long n, const state *s, int spread) {
    lanes most = load(row);
    for (long c = LANES; c < width; c += LANES) {
        const lanes x = load(row + c);
        most = choose(x > most, x, most);
    }
    const float here = most_of(most), old = s->top[n], top = here > old ? here : old;
    const float down = old - top, shrink = s->sum[n] > 0.0f ? expf(down) : 0.0f;
    lanes sums = {}, spreads = {};
    for (long c = 0; c < width; c += LANES) {
        lanes d = load(row + c) - top;
        const lanes e = exp_of(d);
        sums += e;
        if (spread) spreads += e * choose(d < all(-100.0f), all(-100.0f), d);
    }
    if (spread) s->spread[n] = (s->sum[n] > 0.0f ? (s->spread[n] + down * s->sum[n]) * shrink : 0.0f) + sum_of(spreads);
    s->sum[n] = s->sum[n] * shrink + sum_of(sums);
    s->top[n] = top;
}

/* Both pack the block's weights [width][D] and go over all rows, band by band. */
static uint32_t *pack_block(const bf16 *weights, const block *b, int threads) {
    const long panels = panels_of(b->width), size = b->D / 2 * PANEL;
    uint32_t *packed = kept_words((size_t)(panels * size));
    if (packed) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (long i = 0; i < panels; i++)
            pack_columns(weights, b->D, b->D, b->width, i * PANEL, packed + i * size);
    }
    return packed;
}

/* Takes a block of the vocabulary into the running sums. spread == 0: not wanted. Returns 0, or 1 without memory. */
int head_forward(const bf16 *hidden, const bf16 *weights, const int64_t *targets, float *top, float *sum, float *spread,
                 float *target, long N, long D, long first, long width, float sharpness, int threads) {
    const block b = {hidden, targets, N, D, first, width, sharpness};
    const state s = {top, sum, spread, target};
    uint32_t *packed = pack_block(weights, &b, threads);
    if (!packed) return 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (long n = 0; n < N; n += BAND) {
        float sheet[BAND * SHEET];
        for (long column = 0; column < width; column += SHEET) {
            make_sheet(&b, packed, n, column, sheet);
            for (long r = 0; r < least(BAND, N - n); r++) {
                const long at = (long)targets[n + r] - first - column;
                reduce_row(sheet + r * SHEET, SHEET, n + r, &s, spread != 0);
                if (at >= 0 && at < SHEET) target[n + r] = sheet[r * SHEET + at];
            }
        }
    }
    return 0;
}

/* grad[N][stride] = gradient of the block's logits before the temperature: with p = exp(z - total) and pulls on the
 * target's logprob and on the entropy, pull (onehot - p) - pull_entropy p (log p + entropy). Columns from width on get
 * zeros. pull_entropy == 0: none. */
int head_backward(const bf16 *hidden, const bf16 *weights, const int64_t *targets, const float *total,
                  const float *entropy, const float *pull, const float *pull_entropy, bf16 *grad, long stride, long N,
                  long D, long first, long width, float sharpness, int threads) {
    const block b = {hidden, targets, N, D, first, width, sharpness};
    uint32_t *packed = pack_block(weights, &b, threads);
    if (!packed) return 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (long n = 0; n < N; n += BAND) {
        float sheet[BAND * SHEET];
        for (long column = 0; column < stride; column += SHEET) {
            make_sheet(&b, packed, n, column, sheet);
            for (long r = 0; r < least(BAND, N - n); r++) {
                float *row = sheet + r * SHEET;
                const long at = (long)targets[n + r] - first - column;
                for (long c = 0; c < SHEET; c += LANES) {
                    const lanes d = load(row + c) - total[n + r], p = exp_of(d);
                    lanes out = p * -pull[n + r];
                    if (pull_entropy)
                        out -= p * (choose(d < all(-100.0f), all(-100.0f), d) + entropy[n + r]) * pull_entropy[n + r];
                    store(row + c, out);
                }
                if (at >= 0 && at < SHEET) row[at] += pull[n + r];
                bf16 *to = grad + (n + r) * stride + column;
                const long num = least(SHEET, stride - column);
                long c = 0;
                for (; c + LANES <= num; c += LANES) store_e(to + c, load(row + c) * sharpness);
                for (; c < num; c++) to[c] = narrow(row[c] * sharpness);
            }
        }
    }
    return 0;
}
#else
int head_supported(int threads) { return 0 * threads; }
#endif
