/* From logits to a token, chunk by chunk, so that the logits of a large vocabulary need not be kept.
 *
 * A row's chunks are always the same SPAN columns. Of each, the largest logit and the sum of exponentials relative to it
 * are kept; they give the normaliser, and which chunk the row's random number falls into. Only that chunk is looked at
 * again. Sums over chunks are in double, so that a large vocabulary loses no rare token. */
#pragma once
#include "products.h"

enum { SPAN = 128 };

static inline double most_double(double a, double b) { return a > b ? a : b; }

/* How each output's token is drawn, and what came of it. */
typedef struct {
    const double *uniforms;     /* in [0, 1) */
    const double *temperatures; /* 0: the likeliest */
    const int64_t *top_k;       /* 0: off */
    const double *top_p, *min_p; /* 1 and 0: off */
    int64_t *tokens, *valid;    /* valid 0: the logits hold NaN or +inf */
    float *logprobs, *policy_logprobs;
    float *tops, *sums, *policy_sums; /* room for outputs x chunks */
    int64_t num_chunks;
} draws;

static inline float heat_of(const draws *d, long o) {
    return d->temperatures[o] > 0.0 ? (float)(1.0 / d->temperatures[o]) : 1.0f;
}

static inline int truncated(const draws *d, long o) {
    return d->temperatures[o] > 0.0 && (d->top_k[o] > 0 || d->top_p[o] < 1.0 || d->min_p[o] > 0.0);
}

/* e^x, and 0 where a float has hardly anything left. */
static inline __m512 weight16(__m512 x) {
    return _mm512_mask_mov_ps(exp16(x), _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ), _mm512_setzero_ps());
}

/* What is kept of one chunk. */
static inline void note_chunk(const draws *d, long o, long chunk, const float *z, long num) {
    const long at = o * (long)d->num_chunks + chunk;
    const float heat = heat_of(d, o);
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 highest = lowest;
    for (long i = 0; i < num; i += 16)
        highest = _mm512_max_ps(highest, _mm512_mask_loadu_ps(lowest, lanes(num - i), z + i));
    const float top = _mm512_reduce_max_ps(highest);
    /* In a chunk of nothing but minus infinity that, less itself, would be NaN. */
    const __m512 tops = _mm512_set1_ps(top == -INFINITY ? 0.0f : top), heats = _mm512_set1_ps(heat);
    __m512 sum = _mm512_setzero_ps(), policy = sum;
    for (long i = 0; i < num; i += 16) {
        const __mmask16 there = lanes(num - i);
        const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(there, z + i), tops);
        policy = _mm512_mask_add_ps(policy, there, policy, weight16(x));
        if (heat != 1.0f) sum = _mm512_mask_add_ps(sum, there, sum, weight16(_mm512_mul_ps(x, heats)));
    }
    d->tops[at] = top;
    d->policy_sums[at] = _mm512_reduce_add_ps(policy);
    d->sums[at] = heat == 1.0f ? d->policy_sums[at] : _mm512_reduce_add_ps(sum);
}

typedef struct {
    float top;          /* the largest logit */
    double sum, policy; /* of e^(logit - top), with and without temperature */
    long chunk;         /* where the token is */
    double target;      /* how much of the chunk's weights stands before it; < 0: the largest is wanted */
    int valid;
} choice;

/* The normaliser, and in which chunk the token is. */
static inline choice choose_chunk(const draws *d, long o) {
    const long num = (long)d->num_chunks;
    const float *tops = d->tops + o * num, *sums = d->sums + o * num, *policy = d->policy_sums + o * num;
    choice c = {-INFINITY, 0.0, 0.0, 0, -1.0, 0};
    const float heat = heat_of(d, o);
    float scales[16];
    for (long i = 0; i < num; i++)
        if (tops[i] > c.top) c.top = tops[i], c.chunk = i;
    const __m512 best = _mm512_set1_ps(c.top), heats = _mm512_set1_ps(heat);
    for (long i = 0; i < num; i += 16) {
        const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes(num - i), tops + i), best);
        _mm512_storeu_ps(scales, weight16(x));
        for (long k = 0; k < least(16, num - i); k++) c.policy += (double)policy[i + k] * scales[k];
        if (heat != 1.0f) _mm512_storeu_ps(scales, weight16(_mm512_mul_ps(x, heats)));
        for (long k = 0; k < least(16, num - i); k++) c.sum += (double)sums[i + k] * scales[k];
    }
    c.valid = isfinite(c.policy) && isfinite(c.sum) && isfinite(c.top);
    if (!c.valid || d->temperatures[o] <= 0.0) return c;
    const double wanted = d->uniforms[o] * c.sum;
    double before = 0.0;
    for (long i = 0; i < num; i += 16) {
        const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes(num - i), tops + i), best);
        _mm512_storeu_ps(scales, weight16(_mm512_mul_ps(x, heats)));
        for (long k = 0; k < least(16, num - i); k++) {
            const double weight = (double)sums[i + k] * scales[k];
            if (weight <= 0.0) continue;
            c.chunk = i + k;
            c.target = most_double(0.0, (wanted - before) / scales[k]);
            before += weight;
            if (before > wanted) return c;
        }
    }
    return c;
}

/* The token within its chunk: the first whose running sum exceeds the target, never one of weight 0. */
static inline long choose_token(const draws *d, long o, const choice *c, const float *z, long num) {
    float weights[SPAN];
    double running = 0.0;
    long last = 0;
    if (c->target < 0.0) {
        for (long i = 0; i < num; i++)
            if (z[i] == c->top) return i;
        return 0;
    }
    const __m512 top = _mm512_set1_ps(d->tops[o * (long)d->num_chunks + c->chunk]), heat = _mm512_set1_ps(heat_of(d, o));
    for (long i = 0; i < num; i += 16) {
        const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes(num - i), z + i), top);
        _mm512_storeu_ps(weights + i, weight16(_mm512_mul_ps(x, heat)));
    }
    for (long i = 0; i < num; i++) {
        if (weights[i] <= 0.0f) continue;
        last = i;
        running += weights[i];
        if (running > c->target) break;
    }
    return last;
}

static inline void write_down(const draws *d, long o, const choice *c, long token, float logit) {
    d->tokens[o] = token;
    d->valid[o] = c->valid;
    d->policy_logprobs[o] = (float)((double)(logit - c->top) - log(c->policy));
    d->logprobs[o] = c->target < 0.0 ? 0.0f : (float)((double)(logit - c->top) * heat_of(d, o) - log(c->sum));
}
