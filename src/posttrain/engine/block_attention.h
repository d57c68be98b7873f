/* Attention over keys and values in blocks of BLOCK tokens, laid out as the right-hand matrices of two products.
 *
 * Of one key-value head and one block, with K the head width and P = K padded to 32: keys are a panel of K inputs and
 * BLOCK columns, values P / 32 panels of BLOCK inputs and 32 columns; each has room for BLOCK x P elements. A store
 * holds a sequence: [layer][head][block][keys, values]. Several queries go over a block together: those that share a
 * key-value head, those of one prompt's tokens, and those of siblings, which read their prompt from the same store.
 * Softmax runs with a running maximum (Milakov and Gimelshein, 1805.02867), block by block from the first token, so
 * that a query's result is the same to the bit whoever goes with it. Weights are rounded to bf16, and so is what they
 * are divided by. */
#pragma once
#include "products.h"

enum { BLOCK = 32, MOST_GROUP = 64, MOST_WIDTH = 256, QUERIES = 48, AT_ONCE = 6 };

/* Where the keys and values of a sequence are: the first blocks in a store that others read too. */
typedef struct {
    element *own, *shared;
    int64_t own_capacity, shared_capacity, num_shared; /* blocks */
} place;

typedef struct {
    element q[MOST_GROUP * MOST_WIDTH];
    float out[MOST_GROUP * MOST_WIDTH], scores[MOST_GROUP * BLOCK], total[MOST_GROUP * 16], top[MOST_GROUP];
    element weights[MOST_GROUP * BLOCK];
    long first[MOST_GROUP], end[MOST_GROUP]; /* the tokens that each may see */
} queries;

typedef struct {
    long K, P, J; /* head width, padded; key-value heads */
} head_shape;

/* Where a token's block is. */
static inline element *home(const head_shape *h, const place *p, long layer, int values, long head, long block) {
    const int shared = block < p->num_shared;
    const long capacity = (long)(shared ? p->shared_capacity : p->own_capacity);
    const long at = (layer * h->J + head) * capacity + (shared ? block : block - (long)p->num_shared);
    return (shared ? p->shared : p->own) + (2 * at + values) * BLOCK * h->P;
}

static inline void put_key(element *block, long token, const element *key, long K) {
    for (long i = 0; i < K; i += 2) memcpy(block + i * BLOCK + token * 2, key + i, 2 * sizeof(element));
}

static inline void put_value(element *block, long token, const float *value, long K) {
    const int odd = token & 1;
    const __mmask32 where = odd ? 0xaaaaaaaa : 0x55555555;
    for (long i = 0; i < K; i += 16) {
        const __mmask16 there = lanes(K - i);
        __m512i halves = _mm512_cvtepu16_epi32(narrow16(_mm512_maskz_loadu_ps(there, value + i)));
        if (odd) halves = _mm512_slli_epi32(halves, 16);
        element *to = block + i / COLUMNS * COLUMNS * BLOCK + token / 2 * 64 + i % COLUMNS * 2;
        _mm512_mask_storeu_epi16(to, where, halves);
    }
}

/* From a query's scores of one block to its weights; what it has so far is scaled to the new maximum. */
static inline void weigh(queries *s, long i, long block, __m512 scale, long P) {
    const long low = s->first[i] - block * BLOCK, high = s->end[i] - block * BLOCK;
    element *weights = s->weights + i * BLOCK;
    if (high <= 0 || low >= BLOCK) {
        _mm512_storeu_si512(weights, _mm512_setzero_si512());
        return;
    }
    const uint64_t below = high >= BLOCK ? 0xffffffffu : (1u << high) - 1u;
    const uint32_t seen = (uint32_t)below & (low > 0 ? ~((1u << low) - 1u) : 0xffffffffu);
    const __mmask16 here = (__mmask16)seen, there = (__mmask16)(seen >> 16);
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    const __m512 a = _mm512_mask_mul_ps(lowest, here, _mm512_loadu_ps(s->scores + i * BLOCK), scale);
    const __m512 b = _mm512_mask_mul_ps(lowest, there, _mm512_loadu_ps(s->scores + i * BLOCK + 16), scale);
    const __m512 more = _mm512_max_ps(a, b);
    __m512 top = _mm512_set1_ps(s->top[i]), total = _mm512_loadu_ps(s->total + i * 16);
    if (_mm512_cmp_ps_mask(more, top, _CMP_GT_OQ)) {
        const float best = _mm512_reduce_max_ps(more);
        const __m512 shrink = exp16(_mm512_sub_ps(top, _mm512_set1_ps(best)));
        if (s->top[i] > -INFINITY) {
            for (long c = 0; c < P; c += 16) {
                float *sum = s->out + i * P + c;
                _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), shrink));
            }
            total = _mm512_mul_ps(total, shrink);
        }
        s->top[i] = best;
        top = _mm512_set1_ps(best);
    }
    const __m256i x = narrow16(_mm512_maskz_mov_ps(here, exp16(_mm512_sub_ps(a, top))));
    const __m256i y = narrow16(_mm512_maskz_mov_ps(there, exp16(_mm512_sub_ps(b, top))));
    _mm256_storeu_si256((__m256i *)weights, x);
    _mm256_storeu_si256((__m256i *)(weights + 16), y);
    _mm512_storeu_ps(s->total + i * 16, _mm512_add_ps(total, _mm512_add_ps(widen16(x), widen16(y))));
}

/* out[R x 32] (+)= a[R x 2 pairs] times a panel, in two partial sums, so that few queries do not wait for each other's
 * products; meanwhile as many cache lines at `ahead` are on their way. */
static inline __attribute__((always_inline)) void small_tile(const element *a, long a_stride, const element *panel,
                                                             const element *ahead, long pairs, const int add,
                                                             float *out, long out_stride, const int R) {
    __m512 sums[AT_ONCE][4];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 4; i++) sums[r][i] = _mm512_setzero_ps();
#define PAIR(p, first, second)                                                                    \
    {                                                                                             \
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + (p) * 64);                       \
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + (p) * 64 + 32);                  \
        _mm_prefetch((const char *)(ahead + (p) * 64), _MM_HINT_T0);                              \
        _mm_prefetch((const char *)(ahead + (p) * 64 + 32), _MM_HINT_T0);                         \
        for (int r = 0; r < R; r++) {                                                             \
            int32_t two;                                                                          \
            memcpy(&two, a + r * a_stride + 2 * (p), sizeof two);                                 \
            const __m512bh both = (__m512bh)_mm512_set1_epi32(two);                               \
            sums[r][first] = _mm512_dpbf16_ps(sums[r][first], both, b0);                          \
            sums[r][second] = _mm512_dpbf16_ps(sums[r][second], both, b1);                        \
        }                                                                                         \
    }
    long p = 0;
    for (; p + 2 <= pairs; p += 2) {
        PAIR(p, 0, 1)
        PAIR(p + 1, 2, 3)
    }
    if (p < pairs) PAIR(p, 0, 1)
#undef PAIR
    for (int r = 0; r < R; r++) {
        float *to = out + r * out_stride;
        __m512 left = _mm512_add_ps(sums[r][0], sums[r][2]), right = _mm512_add_ps(sums[r][1], sums[r][3]);
        if (add) left = _mm512_add_ps(left, _mm512_loadu_ps(to)), right = _mm512_add_ps(right, _mm512_loadu_ps(to + 16));
        _mm512_storeu_ps(to, left);
        _mm512_storeu_ps(to + 16, right);
    }
}

static inline __attribute__((always_inline)) void small_product(const element *a, long a_stride, const element *packed,
                                                                const element *ahead, long inner, const int add,
                                                                float *out, long out_stride, long rows, long panels) {
    const long pairs = inner / 2;
    for (long n = 0; n < panels; n++)
        for (long r = 0; r < rows; r += AT_ONCE) {
            const element *some = a + r * a_stride, *panel = packed + n * pairs * 64, *next = ahead + n * pairs * 64;
            float *to = out + r * out_stride + n * COLUMNS;
            switch (least(rows - r, AT_ONCE)) {
#define CASE(R) \
    case R: small_tile(some, a_stride, panel, next, pairs, add, to, out_stride, R); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
            default: break;
            }
        }
}

/* The queries [from, to) over one block, while the blocks of a later visit are on their way. */
static void attend_block(queries *s, long from, long to, long block, const element *keys, const element *values,
                         const element *later_keys, const element *later_values, const head_shape *h, __m512 scale) {
    small_product(s->q + from * h->K, h->K, keys, later_keys, h->K, 0, s->scores + from * BLOCK, BLOCK, to - from, 1);
    for (long i = from; i < to; i++) weigh(s, i, block, scale, h->P);
    small_product(s->weights + from * BLOCK, BLOCK, values, later_values, BLOCK, 1, s->out + from * h->P, h->P,
                  to - from, h->P / COLUMNS);
}

/* A query's output, as bf16. */
static inline void finish(const queries *s, long i, long K, long P, element *out) {
    const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_loadu_ps(s->total + i * 16)));
    for (long c = 0; c < K; c += 16)
        _mm256_mask_storeu_epi16(out + c, lanes(K - c), narrow16(_mm512_mul_ps(_mm512_loadu_ps(s->out + i * P + c), share)));
}
