/* Drawing from the likeliest tokens only, without sorting the vocabulary.
 *
 * Tokens are counted and weighed in bins of falling probability, STEPS of them to a factor of e. What top-k, top-p and
 * min-p keep is a beginning of the falling order, so each cut, and the draw itself, falls into one bin; only those bins'
 * tokens are put in order. Truncation is applied after temperature, in the order top-k, top-p, min-p; the mass of top-p
 * is measured after top-k. Of equal logits the lower token stands first. */
#pragma once
#include <stdlib.h>

#include "draw.h"

enum { STEPS = 64, BINS = 4096 };

typedef struct {
    int32_t counts[BINS];
    double masses[BINS];
} bins;

typedef struct {
    float below; /* nats below the best */
    int32_t token;
} candidate;

static int order(const void *left, const void *right) {
    const candidate *a = left, *b = right;
    if (a->below != b->below) return a->below < b->below ? -1 : 1;
    return (a->token > b->token) - (a->token < b->token);
}

static inline long bin_of(float below) { return below * STEPS < BINS - 1 ? (long)(below * STEPS) : BINS - 1; }

static inline __m512 below16(const float *z, __mmask16 there, float top, float heat) {
    const __m512 x = _mm512_sub_ps(_mm512_set1_ps(top), _mm512_maskz_loadu_ps(there, z));
    return _mm512_mul_ps(x, _mm512_set1_ps(heat));
}

/* The tokens of one bin in falling order. */
static long sorted_bin(const float *z, long vocab, float top, float heat, long bin, candidate *found) {
    float below[16];
    long num = 0;
    const __m512 low = _mm512_set1_ps((float)bin), high = _mm512_set1_ps((float)(bin + 1));
    for (long i = 0; i < vocab; i += 16) {
        const __m512 x = below16(z + i, lanes(vocab - i), top, heat), place = _mm512_mul_ps(x, _mm512_set1_ps(STEPS));
        __mmask16 here = _mm512_mask_cmp_ps_mask(lanes(vocab - i), place, low, _CMP_GE_OQ);
        if (bin < BINS - 1) here = _mm512_mask_cmp_ps_mask(here, place, high, _CMP_LT_OQ);
        if (!here) continue;
        _mm512_storeu_ps(below, x);
        for (long k = 0; k < 16; k++)
            if (here >> k & 1) found[num++] = (candidate){below[k], (int32_t)(i + k)};
    }
    qsort(found, (size_t)num, sizeof *found, order);
    return num;
}

static inline float weight_of(float below) {
    return _mm512_cvtss_f32(weight16(_mm512_set1_ps(-below)));
}

/* Where a beginning of the falling order ends: so many tokens of a bin and all of those before it. */
typedef struct {
    long bin, num;
    double mass;
} cut;

static inline cut sooner(cut a, cut b) { return a.bin < b.bin || (a.bin == b.bin && a.num < b.num) ? a : b; }

/* The cut after at most `count` tokens, at most those before which less than `mass` stands, none below `lowest`. */
static cut cut_at(const bins *b, const float *z, long vocab, float top, float heat, double count, double mass,
                  double lowest, candidate *room) {
    cut c = {0, 0, 0.0};
    double tokens = 0.0;
    for (; c.bin < BINS; c.bin++) {
        const double more = c.mass + b->masses[c.bin];
        const int last = lowest > 0.0 && (double)(c.bin + 1) / STEPS >= -log(lowest);
        if (tokens + b->counts[c.bin] >= count || more >= mass || last) break;
        tokens += b->counts[c.bin], c.mass = more;
    }
    if (c.bin == BINS) return c;
    const long num = sorted_bin(z, vocab, top, heat, c.bin, room);
    for (; c.num < num; c.num++) {
        const double weight = weight_of(room[c.num].below);
        if (tokens >= count || c.mass >= mass || weight < lowest) break;
        tokens += 1.0, c.mass += weight;
    }
    return c;
}

/* Draw for one output with its logits at hand; `room` for as many candidates as the vocabulary has. */
static void draw_truncated(const draws *d, long o, const choice *c, const float *z, long vocab, bins *b,
                           candidate *room) {
    const float heat = heat_of(d, o);
    float keys[16], weights[16];
    memset(b->counts, 0, sizeof b->counts);
    memset(b->masses, 0, sizeof b->masses);
    for (long i = 0; i < vocab; i += 16) {
        const __m512 x = below16(z + i, lanes(vocab - i), c->top, heat);
        _mm512_storeu_ps(keys, x);
        _mm512_storeu_ps(weights, weight16(_mm512_sub_ps(_mm512_setzero_ps(), x)));
        for (long k = 0; k < least(16, vocab - i); k++) {
            const long bin = bin_of(keys[k]);
            b->counts[bin]++, b->masses[bin] += weights[k];
        }
    }
    const double size = (double)vocab, all = INFINITY;
    const double count = d->top_k[o] > 0 && d->top_k[o] < vocab ? (double)d->top_k[o] : size;
    cut kept = cut_at(b, z, vocab, c->top, heat, count, all, 0.0, room);
    if (d->top_p[o] < 1.0) {
        const double whole = count < size ? kept.mass : c->sum;
        kept = sooner(kept, cut_at(b, z, vocab, c->top, heat, size, d->top_p[o] * whole, 0.0, room));
    }
    if (d->min_p[o] > 0.0) kept = sooner(kept, cut_at(b, z, vocab, c->top, heat, size, all, d->min_p[o], room));
    if (kept.bin == 0 && kept.num == 0) kept.num = 1, kept.mass = 1.0; /* the likeliest always stays */
    const double target = d->uniforms[o] * kept.mass;
    double running = 0.0;
    long bin = 0;
    while (bin < kept.bin && running + b->masses[bin] <= target) running += b->masses[bin++];
    for (;; bin++) {
        const long found = sorted_bin(z, vocab, c->top, heat, bin, room);
        const long num = bin == kept.bin ? least(kept.num, found) : found;
        for (long i = 0; i < num; i++) {
            const float weight = weight_of(room[i].below);
            if (weight > 0.0f) write_down(d, o, c, room[i].token, z[room[i].token]);
            if (weight > 0.0f) d->logprobs[o] = (float)(log(weight) - log(kept.mass));
            running += weight;
            if (running > target) return;
        }
        if (bin >= kept.bin) return;
    }
}
