/* Attention of one new token per row over a slot cache, for CPUs.
 *
 * For each row and key-value head: write the new key and value into the cache, then let the G query heads that share
 * them attend to the cached tokens [first, end), reading each key and value once. Softmax runs over blocks of tokens
 * with a running maximum (Milakov and Gimelshein, 1805.02867), in fp32 throughout.
 *
 * native.py compiles this with the machine's own C compiler, with or without -DBF16. Plain loops, which the compiler
 * turns into vector instructions.
 */
#include "elements.h"

enum { BLOCK = 64, AHEAD = 8, MOST_GROUP = 64, MOST_WIDTH = 256 };

/* Ask for the cache lines of one token. Memory past the end may be asked for: that is no access. */
static inline void fetch(const element *token, const long K) {
    for (long i = 0; i < K; i += 64 / (long)sizeof(element)) __builtin_prefetch(token + i);
}

/* The G queries of one row and key-value head. Inlined, so that constant G and K unroll. */
static inline __attribute__((always_inline)) void attend(const element *q, const element *keys, const element *values,
                                                         element *out, long first, long end, const long G,
                                                         const long K) {
    float query[MOST_GROUP * MOST_WIDTH], sum[MOST_GROUP * MOST_WIDTH], row[MOST_WIDTH];
    float top[MOST_GROUP], total[MOST_GROUP], scores[MOST_GROUP][BLOCK];
    const float scale = 1.0f / sqrtf((float)K);
    for (long i = 0; i < G * K; i++) query[i] = widen(q[i]) * scale, sum[i] = 0.0f;
    for (long g = 0; g < G; g++) top[g] = -INFINITY, total[g] = 0.0f;
    for (long start = first; start < end; start += BLOCK) {
        const long num = end - start < BLOCK ? end - start : BLOCK;
        for (long t = 0; t < num; t++) {
            const element *key = keys + (start + t) * K;
            /* Streams are short and begin anew with every head: the processor alone would wait for each. */
            fetch(key + AHEAD * K, K);
            fetch(values + (start + t) * K, K);
#pragma omp simd
            for (long i = 0; i < K; i++) row[i] = widen(key[i]);
            for (long g = 0; g < G; g++) {
                float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                for (long i = 0; i < K; i++) dot += query[g * K + i] * row[i];
                scores[g][t] = dot;
            }
        }
        for (long g = 0; g < G; g++) {
            float best = top[g], added = 0.0f;
#pragma omp simd reduction(max : best)
            for (long t = 0; t < num; t++) best = scores[g][t] > best ? scores[g][t] : best;
            const float shrink = start == first ? 0.0f : exp_nonpositive(top[g] - best);
#pragma omp simd reduction(+ : added)
            for (long t = 0; t < num; t++) {
                const float weight = exp_nonpositive(scores[g][t] - best);
                scores[g][t] = weight;
                added += weight;
            }
            total[g] = total[g] * shrink + added;
            top[g] = best;
#pragma omp simd
            for (long i = 0; i < K; i++) sum[g * K + i] *= shrink;
        }
        for (long t = 0; t < num; t++) {
            const element *value = values + (start + t) * K;
#pragma omp simd
            for (long i = 0; i < K; i++) row[i] = widen(value[i]);
            for (long g = 0; g < G; g++) {
                const float weight = scores[g][t];
#pragma omp simd
                for (long i = 0; i < K; i++) sum[g * K + i] += weight * row[i];
            }
        }
    }
    for (long g = 0; g < G; g++) {
        const float share = 1.0f / total[g];
        for (long i = 0; i < K; i++) out[g * K + i] = narrow(sum[g * K + i] * share);
    }
}

/* Strides are in elements; within a row, heads and their numbers are contiguous. window 0 is none.
 * Returns 0, or 1 if a group or a head is too wide, with nothing done. */
int decode_attention(const element *q, long q_stride, const element *new_keys, long key_stride,
                     const element *new_values, long value_stride, element *keys, element *values, long slot_stride,
                     long head_stride, const int64_t *lengths, element *out, long rows, long J, long G, long K,
                     long window, int threads) {
    if (G > MOST_GROUP || K > MOST_WIDTH) return 1;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
    for (long item = 0; item < rows * J; item++) {
        const long b = item / J, j = item % J, at = (long)lengths[b], end = at + 1;
        const long first = window > 0 && end > window ? end - window : 0;
        element *k = keys + b * slot_stride + j * head_stride, *v = values + b * slot_stride + j * head_stride;
        memcpy(k + at * K, new_keys + b * key_stride + j * K, (size_t)K * sizeof(element));
        memcpy(v + at * K, new_values + b * value_stride + j * K, (size_t)K * sizeof(element));
        const element *mine = q + b * q_stride + j * G * K;
        element *theirs = out + (b * J + j) * G * K;
        if (K == 32 && G == 1) attend(mine, k, v, theirs, first, end, 1, 32);
        else if (K == 32 && G == 2) attend(mine, k, v, theirs, first, end, 2, 32);
        else if (K == 32) attend(mine, k, v, theirs, first, end, G, 32);
        else if (K == 64 && G == 1) attend(mine, k, v, theirs, first, end, 1, 64);
        else if (K == 64) attend(mine, k, v, theirs, first, end, G, 64);
        else if (K == 128) attend(mine, k, v, theirs, first, end, G, 128);
        else attend(mine, k, v, theirs, first, end, G, K);
    }
    return 0;
}
