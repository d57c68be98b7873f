/* Causal attention of sequences that lie end to end, forward and backward, with rotary positions, for CPUs.
 *
 * A row of `heads` is one token: H query heads, J key heads, J value heads, of K numbers each. Each sequence and
 * key-value head is one piece of work: its keys and values are brought into fp32 once, in tiles of 32 keys that lie
 * side by side; then four queries at a time go over the tiles they see. Softmax runs over chunks of keys with a running
 * maximum (Milakov and Gimelshein, 1805.02867); backward computes the weights again from the logarithm of their sum
 * (FlashAttention, 2205.14135). Everything is fp32 but what is read and written. No two pieces of work write the same
 * number, so results do not depend on the number of threads.
 *
 * native.py compiles this with the machine's own C compiler, with or without -DBF16.
 */
#include <stdlib.h>

#include "lanes.h"

enum { ROWS = 4, TILE = 2 * LANES, CHUNK = 8 * TILE, AHEAD = 8 };

typedef struct {
    const element *heads;
    const float *cos, *sin; /* K numbers a token; the first half of sin is negated. cos == 0: no rotary positions */
    const int64_t *starts;  /* of the sequences, and the end of the last */
    long num, H, J, K, window;
} task;

static inline long padded(long K) { return (K + LANES - 1) / LANES * LANES; }
static inline long smaller(long a, long b) { return a < b ? a : b; }
static inline long larger(long a, long b) { return a > b ? a : b; }

/* Ask for a head's cache lines ahead of time: the tokens' heads lie too far apart for the processor to foresee. Memory
 * past the end may be asked for: that is no access. */
static inline void fetch(const element *head, long K) {
    for (long i = 0; i < K; i += 64 / (long)sizeof(element)) __builtin_prefetch(head + i);
}

/* One head of one token, in fp32, turned by its position, times scale, padded with zeros to P numbers. */
static inline void read_head(const task *t, long token, long head, int turn, float scale, float *to, long P) {
    const element *from = t->heads + (token * (t->H + 2 * t->J) + head) * t->K;
    const long K = t->K, half = K / 2;
    const float *cos = t->cos + token * K, *sin = t->sin + token * K;
    long i = 0;
    fetch(from + AHEAD * (t->H + 2 * t->J) * K, K);
    if (turn && t->cos && half % LANES == 0) {
        for (; i < half; i += LANES) {
            const lanes a = load_e(from + i) * scale, b = load_e(from + i + half) * scale;
            store(to + i, a * load(cos + i) + b * load(sin + i));
            store(to + i + half, b * load(cos + i + half) + a * load(sin + i + half));
        }
        return;
    }
    if (turn && t->cos) {
        for (; i < half; i++) {
            const float a = widen(from[i]) * scale, b = widen(from[i + half]) * scale;
            to[i] = a * cos[i] + b * sin[i];
            to[i + half] = b * cos[i + half] + a * sin[i + half];
        }
    } else {
        for (; i + LANES <= K; i += LANES) store(to + i, load_e(from + i) * scale);
        for (; i < K; i++) to[i] = widen(from[i]) * scale;
    }
    for (i = K; i < P; i++) to[i] = 0.0f;
}

static inline void write_numbers(element *to, const float *from, float scale, long num) {
    long i = 0;
    for (; i + LANES <= num; i += LANES) store_e(to + i, load(from + i) * scale);
    for (; i < num; i++) to[i] = narrow(from[i] * scale);
}

/* The reverse: a head's gradient goes to its place, turned back. */
static inline void write_gradient(const task *t, element *grads, long token, long head, int turn, float scale,
                                  const float *from) {
    element *to = grads + (token * (t->H + 2 * t->J) + head) * t->K;
    const long K = t->K, half = K / 2;
    const float *cos = t->cos + token * K, *sin = t->sin + token * K;
    if (!turn || !t->cos) {
        write_numbers(to, from, scale, K);
        return;
    }
    long i = 0;
    for (; i + LANES <= half; i += LANES) {
        const lanes a = load(from + i) * scale, b = load(from + i + half) * scale;
        store_e(to + i, a * load(cos + i) + b * load(sin + i + half));
        store_e(to + i + half, b * load(cos + i + half) + a * load(sin + i));
    }
    for (; i < half; i++) {
        const float a = from[i] * scale, b = from[i + half] * scale;
        to[i] = narrow(a * cos[i] + b * sin[i + half]);
        to[i + half] = narrow(b * cos[i + half] + a * sin[i]);
    }
}

/* P x TILE: the tile's keys side by side; keys past the end are zeros. */
static inline void make_tiles(const float *rows, float *tiles, long length, long P) {
    for (long start = 0; start < length; start += TILE) {
        float *tile = tiles + start * P;
        const long num = smaller(TILE, length - start);
        for (long i = 0; i < P; i++) {
            for (long j = 0; j < num; j++) tile[i * TILE + j] = rows[(start + j) * P + i];
            for (long j = num; j < TILE; j++) tile[i * TILE + j] = 0.0f;
        }
    }
}

/* out[r][0..TILE) = the products of four rows with a tile's keys. */
static void products(const float *rows, const float *tile, float *out, long stride, long P) {
    lanes sums[ROWS][2] = {};
    for (long i = 0; i < P; i++) {
        const lanes a = load(tile + i * TILE), b = load(tile + i * TILE + LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const float x = rows[r * P + i];
            sums[r][0] += x * a;
            sums[r][1] += x * b;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        store(out + r * stride, sums[r][0]);
        store(out + r * stride + LANES, sums[r][1]);
    }
}

/* sums[r] += sum over j of weights[r][j] * rows[j]: two vectors of the P numbers at a time. */
static void weigh(const float *weights, long stride, const float *rows, long num, float *sums, long P) {
    long at = 0;
    for (; at + 2 * LANES <= P; at += 2 * LANES) {
        lanes acc[ROWS][2];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            acc[r][0] = load(sums + r * P + at);
            acc[r][1] = load(sums + r * P + at + LANES);
        }
        for (long j = 0; j < num; j++) {
            const lanes a = load(rows + j * P + at), b = load(rows + j * P + at + LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const float x = weights[r * stride + j];
                acc[r][0] += x * a;
                acc[r][1] += x * b;
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            store(sums + r * P + at, acc[r][0]);
            store(sums + r * P + at + LANES, acc[r][1]);
        }
    }
    for (; at < P; at += LANES)
        for (int r = 0; r < ROWS; r++) {
            lanes acc = load(sums + r * P + at);
            for (long j = 0; j < num; j++) acc += weights[r * stride + j] * load(rows + j * P + at);
            store(sums + r * P + at, acc);
        }
}

/* sums[j] += sum over r of weights[r][j] * rows[r] */
static void spread(const float *weights, long stride, const float *rows, float *sums, long num, long P) {
    for (long at = 0; at < P; at += LANES) {
        lanes row[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) row[r] = load(rows + r * P + at);
        for (long j = 0; j < num; j++) {
            lanes sum = load(sums + j * P + at);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) sum += weights[r * stride + j] * row[r];
            store(sums + j * P + at, sum);
        }
    }
}

/* What a query does not see, within columns [from, from + width), becomes -infinity. */
static inline void hide(float *row, long from, long width, long query, long window) {
    const float first = window > 0 ? (float)(query - window + 1) : 0.0f, last = (float)query;
    for (long c = 0; c < width; c += LANES) {
        const lanes key = counting((float)(from + c));
        store(row + c, choose((key < first) | (key > last), all(-INFINITY), load(row + c)));
    }
}

/* Four queries of one head: their outputs (unscaled sums and totals are finished here) and log-sum-exp. */
static void attend_rows(const task *t, long first_query, long length, const float *q, const float *k_tiles,
                        const float *v, float *out, float *lse, long P) {
    float scores[ROWS * CHUNK], top[ROWS], total[ROWS];
    const long last = smaller(first_query + ROWS, length) - 1;
    const long first = t->window > 0 ? larger(0, first_query - t->window + 1) / TILE * TILE : 0;
    for (int r = 0; r < ROWS; r++) top[r] = -INFINITY, total[r] = 0.0f;
    memset(out, 0, (size_t)(ROWS * P) * sizeof(float));
    for (long start = first; start <= last; start += CHUNK) {
        const long end = smaller(start + CHUNK, last + 1), width = (end - start + TILE - 1) / TILE * TILE;
        for (long c = 0; c < width; c += TILE) products(q, k_tiles + (start + c) * P, scores + c, CHUNK, P);
        for (int r = 0; r < ROWS; r++) {
            float *row = scores + r * CHUNK;
            if (start + width > first_query || t->window > 0)
                hide(row, start, width, smaller(first_query + r, last), t->window);
            lanes most = load(row);
            for (long c = LANES; c < width; c += LANES) {
                const lanes x = load(row + c);
                most = choose(x > most, x, most);
            }
            const float here = most_of(most);
            float best = here > top[r] ? here : top[r];
            if (best == -INFINITY) best = -1e30f; /* nothing seen in this chunk yet */
            const float shrink = total[r] > 0.0f ? expf(top[r] - best) : 0.0f;
            lanes added = {};
            for (long c = 0; c < width; c += LANES) {
                const lanes weight = exp_of(load(row + c) - best);
                store(row + c, weight);
                added += weight;
            }
            total[r] = total[r] * shrink + sum_of(added);
            top[r] = best;
            if (start > first)
                for (long i = 0; i < P; i += LANES) store(out + r * P + i, load(out + r * P + i) * shrink);
        }
        weigh(scores, CHUNK, v + start * P, end - start, out, P);
    }
    for (int r = 0; r < ROWS; r++) {
        lse[r] = top[r] + logf(total[r]);
        for (long i = 0; i < P; i += LANES) store(out + r * P + i, load(out + r * P + i) / total[r]);
    }
}

static void forward(const task *t, long item, element *out, float *lse, float *scratch, long P) {
    const long s = item / t->J, j = item % t->J, G = t->H / t->J, start = (long)t->starts[s];
    const long length = (long)t->starts[s + 1] - start, tiled = (length + TILE - 1) / TILE * TILE;
    float *k = scratch, *v = k + tiled * P, *k_tiles = v + tiled * P, *q = k_tiles + tiled * P, *sums = q + ROWS * P;
    float logs[ROWS];
    const float scale = 1.0f / sqrtf((float)t->K);
    for (long i = 0; i < length; i++) {
        read_head(t, start + i, t->H + j, 1, 1.0f, k + i * P, P);
        read_head(t, start + i, t->H + t->J + j, 0, 1.0f, v + i * P, P);
    }
    make_tiles(k, k_tiles, length, P);
    for (long h = j * G; h < (j + 1) * G; h++)
        for (long i = 0; i < length; i += ROWS) {
            for (long r = 0; r < ROWS; r++) read_head(t, start + smaller(i + r, length - 1), h, 1, scale, q + r * P, P);
            attend_rows(t, i, length, q, k_tiles, v, sums, logs, P);
            for (long r = 0; r < smaller(ROWS, length - i); r++) {
                element *to = out + ((start + i + r) * t->H + h) * t->K;
                write_numbers(to, sums + r * P, 1.0f, t->K);
                lse[(start + i + r) * t->H + h] = logs[r];
            }
        }
}

/* Four queries of one head: adds to the gradients of keys and values, gives that of the queries (unscaled). */
static void pull_rows(const task *t, long first_query, long length, const float *q, const float *pull, const float *k,
                      const float *k_tiles, const float *v_tiles, const float *lse, const float *delta, float *grad_q,
                      float *grad_k, float *grad_v, long P) {
    float weights[ROWS * CHUNK], changes[ROWS * CHUNK];
    const long last = smaller(first_query + ROWS, length) - 1;
    const long first = t->window > 0 ? larger(0, first_query - t->window + 1) / TILE * TILE : 0;
    memset(grad_q, 0, (size_t)(ROWS * P) * sizeof(float));
    for (long start = first; start <= last; start += CHUNK) {
        const long end = smaller(start + CHUNK, last + 1), width = (end - start + TILE - 1) / TILE * TILE;
        for (long c = 0; c < width; c += TILE) {
            products(q, k_tiles + (start + c) * P, weights + c, CHUNK, P);
            products(pull, v_tiles + (start + c) * P, changes + c, CHUNK, P);
        }
        for (int r = 0; r < ROWS; r++) {
            float *weight = weights + r * CHUNK, *change = changes + r * CHUNK;
            const long query = first_query + r <= last ? first_query + r : -1; /* none sees nothing */
            if (start + width > first_query || t->window > 0 || query < 0)
                hide(weight, start, width, query, t->window);
            for (long c = 0; c < width; c += LANES) {
                const lanes p = exp_of(load(weight + c) - lse[r]);
                store(weight + c, p);
                store(change + c, p * (load(change + c) - delta[r]));
            }
        }
        weigh(changes, CHUNK, k + start * P, end - start, grad_q, P);
        spread(changes, CHUNK, q, grad_k + start * P, end - start, P);
        spread(weights, CHUNK, pull, grad_v + start * P, end - start, P);
    }
}

/* The gradient of one output, in fp32; returns its product with the output. */
static inline float read_pull(const element *grad, const element *out, float *to, long K, long P) {
    lanes sums = {};
    long i = 0;
    for (; i + LANES <= K; i += LANES) {
        const lanes g = load_e(grad + i);
        store(to + i, g);
        sums += g * load_e(out + i);
    }
    float sum = sum_of(sums);
    for (; i < K; i++) {
        to[i] = widen(grad[i]);
        sum += to[i] * widen(out[i]);
    }
    for (; i < P; i++) to[i] = 0.0f;
    return sum;
}

static void backward(const task *t, long item, const element *out, const float *lse, const element *grad_out,
                     element *grads, float *scratch, long P) {
    const long s = item / t->J, j = item % t->J, G = t->H / t->J, start = (long)t->starts[s];
    const long length = (long)t->starts[s + 1] - start, tiled = (length + TILE - 1) / TILE * TILE;
    float *k = scratch, *v = k + tiled * P, *k_tiles = v + tiled * P, *v_tiles = k_tiles + tiled * P;
    float *grad_k = v_tiles + tiled * P, *grad_v = grad_k + tiled * P;
    float *q = grad_v + tiled * P, *pull = q + ROWS * P, *grad_q = pull + ROWS * P, logs[ROWS], delta[ROWS];
    const float scale = 1.0f / sqrtf((float)t->K);
    for (long i = 0; i < length; i++) {
        read_head(t, start + i, t->H + j, 1, 1.0f, k + i * P, P);
        read_head(t, start + i, t->H + t->J + j, 0, 1.0f, v + i * P, P);
    }
    make_tiles(k, k_tiles, length, P);
    make_tiles(v, v_tiles, length, P);
    memset(grad_k, 0, (size_t)(2 * tiled * P) * sizeof(float));
    for (long h = j * G; h < (j + 1) * G; h++)
        for (long i = 0; i < length; i += ROWS) {
            for (long r = 0; r < ROWS; r++) {
                const long token = start + smaller(i + r, length - 1), at = (token * t->H + h) * t->K;
                const long ahead = AHEAD * t->H * t->K;
                fetch(grad_out + at + ahead, t->K);
                fetch(out + at + ahead, t->K);
                read_head(t, token, h, 1, scale, q + r * P, P);
                delta[r] = read_pull(grad_out + at, out + at, pull + r * P, t->K, P);
                logs[r] = lse[token * t->H + h];
            }
            pull_rows(t, i, length, q, pull, k, k_tiles, v_tiles, logs, delta, grad_q, grad_k, grad_v, P);
            for (long r = 0; r < smaller(ROWS, length - i); r++)
                write_gradient(t, grads, start + i + r, h, 1, scale, grad_q + r * P);
        }
    for (long i = 0; i < length; i++) {
        write_gradient(t, grads, start + i, t->H + j, 1, 1.0f, grad_k + i * P);
        write_gradient(t, grads, start + i, t->H + t->J + j, 0, 1.0f, grad_v + i * P);
    }
}

/* Numbers of scratch memory per thread: `arrays` of the longest sequence's tiles and a few rows. */
static long scratch_size(const task *t, long arrays) {
    long longest = 0;
    for (long s = 0; s < t->num; s++) longest = larger(longest, (long)(t->starts[s + 1] - t->starts[s]));
    return ((longest + TILE - 1) / TILE * TILE * arrays + 3 * ROWS) * padded(t->K);
}

/* Both return 0, or 1 where memory ran out. `out` has H x K numbers a token, `lse` H. */
int packed_attention(const element *heads, const float *cos, const float *sin, const int64_t *starts, long num, long H,
                     long J, long K, long window, element *out, float *lse, int threads) {
    const task t = {heads, cos, sin, starts, num, H, J, K, window};
    const long size = scratch_size(&t, 3);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *scratch = aligned_alloc(64, (size_t)((size + LANES - 1) / LANES * LANES) * sizeof(float));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < num * J; item++)
            if (scratch) forward(&t, item, out, lse, scratch, padded(K));
        free(scratch);
    }
    return failed;
}

int packed_attention_backward(const element *heads, const float *cos, const float *sin, const int64_t *starts, long num,
                              long H, long J, long K, long window, const element *out, const float *lse,
                              const element *grad_out, element *grads, int threads) {
    const task t = {heads, cos, sin, starts, num, H, J, K, window};
    const long size = scratch_size(&t, 6);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *scratch = aligned_alloc(64, (size_t)((size + LANES - 1) / LANES * LANES) * sizeof(float));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < num * J; item++)
            if (scratch) backward(&t, item, out, lse, grad_out, grads, scratch, padded(K));
        free(scratch);
    }
    return failed;
}
