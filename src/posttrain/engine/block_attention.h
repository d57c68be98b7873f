/* Attention over keys and values in blocks of BLOCK tokens, laid out as the right-hand matrices of two products.
 *
 * Of one key-value head and one block, with K the head width and P = K padded to 32: keys are a panel of K inputs and
 * BLOCK columns, values P / 32 panels of BLOCK inputs and 32 columns; each has room for BLOCK x P elements. A store
 * holds a sequence: [layer][keys, values][head][block]. Several queries go over a block together: those that share a
 * key-value head, those of one prompt's tokens, and those of siblings, which read their prompt from the same store.
 * Softmax runs with a running maximum (Milakov and Gimelshein, 1805.02867), block by block from the first token, so
 * that a query's result is the same to the bit whoever goes with it. Weights are rounded to bf16, and so is what they
 * are divided by. */
#pragma once
#include "products.h"

enum { BLOCK = 32, MOST_GROUP = 64, MOST_WIDTH = 256, QUERIES = 48 };

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

static inline element *block_of(const head_shape *h, element *store, long capacity, long layer, int values, long head,
                                long block) {
    return store + ((((layer * 2 + values) * h->J + head) * capacity) + block) * BLOCK * h->P;
}

/* Where a token's block is. */
static inline element *home(const head_shape *h, const place *p, long layer, int values, long head, long block) {
    return block < p->num_shared
               ? block_of(h, p->shared, (long)p->shared_capacity, layer, values, head, block)
               : block_of(h, p->own, (long)p->own_capacity, layer, values, head, block - (long)p->num_shared);
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

/* The queries [from, to) over one block. */
static void attend_block(queries *s, long from, long to, long block, const element *keys, const element *values,
                         const head_shape *h, __m512 scale) {
    product(s->q + from * h->K, h->K, keys, h->K, 0, s->scores + from * BLOCK, BLOCK, to - from, 0, 1);
    for (long i = from; i < to; i++) weigh(s, i, block, scale, h->P);
    product_added(s->weights + from * BLOCK, BLOCK, values, BLOCK, 0, s->out + from * h->P, h->P, to - from, 0,
                  h->P / COLUMNS);
}

/* The queries [from, to), one place's, over its blocks [start, end). */
static void attend_blocks(queries *s, long from, long to, long start, long end, const place *p, long layer, long head,
                          const head_shape *h, __m512 scale) {
    for (long block = start; block < end; block++) {
        const element *keys = home(h, p, layer, 0, head, block), *values = home(h, p, layer, 1, head, block);
        for (long i = 0; i < BLOCK * h->P; i += 32) __builtin_prefetch(values + i);
        attend_block(s, from, to, block, keys, values, h, scale);
    }
}

/* A query's output, as bf16. */
static inline void finish(const queries *s, long i, long K, long P, element *out) {
    const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_loadu_ps(s->total + i * 16)));
    for (long c = 0; c < K; c += 16)
        _mm256_mask_storeu_epi16(out + c, lanes(K - c), narrow16(_mm512_mul_ps(_mm512_loadu_ps(s->out + i * P + c), share)));
}
