/* Tokens through a whole decoder, one for every running row or all of some prompts, on a CPU with AVX-512 bf16.
 *
 * For RMSNorm-before, rotary, gated-SiLU decoders with bf16 weights (Llama, Mistral, Qwen2, Qwen3). The residual
 * stream, norms, rotary positions, softmax and the MLP's gate are fp32; matrix products take bf16 and add up in fp32;
 * keys and values are kept in bf16. The output head multiplies the fp32 state as a sum of two bf16 numbers, which is
 * exact to 2^-16, so that logits are not rounded to bf16.
 *
 * A row is a token; rows of one sequence follow one another, so that a later one finds the keys of those before it in the
 * cache. Sequences are independent: with many of them each thread takes some through all layers and meets nobody, TILE
 * rows at a time. With few, the threads share every row's columns and heads, and wait for each other after each phase. A
 * row's result is the same either way and whoever else is in the batch: every sum is over one row, in one order.
 *
 * compiled.py packs the weights: 32 output columns side by side, two inputs at a time.
 */
#define BF16
#include "decode_attention.c"

#ifdef _OPENMP
#include <omp.h>
#endif

/* What Python fills in; pointers are addresses. Per layer LAYER_FIELDS entries in `layers`. */
typedef struct {
    int64_t layers, width, heads, kv_heads, head_dim, mlp, vocab;
    int64_t scratch_floats, scratch_halves; /* per row */
    double eps;
    const element *embed; /* V x D */
    const float *final_norm;
    const element *head;     /* packed */
    const float *cosines, *sines; /* positions x K/2 */
} model_shape;

typedef struct {
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm, *qkv_bias, *out_bias, *up_bias, *down_bias;
    const element *qkv, *out, *up, *down; /* packed */
    int64_t window;
} layer_weights;

/* The rows of one call: token, row of the cache, position, and the row of `logits` it is to fill, or -1. */
typedef struct {
    const int64_t *tokens, *slots, *positions, *outputs;
    const int64_t *sequences; /* where each sequence begins, and the end of the last; NULL: each row is one */
    int64_t num_rows, num_sequences;
    element *const *keys, *const *values; /* of each layer */
    int64_t slot_stride, head_stride;     /* of the caches, in elements */
    float *logits;
    int64_t logits_stride;
} call;

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>

int decode_step_supported(void) { return 1; }

enum { COLUMNS = 32, MOST_ROWS = 12, TILE = 128 };

int decode_step_tile(void) { return TILE; }

static inline long padded(long n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* out[R x 32] (+)= a[R x 2*pairs] times one packed panel. */
static inline __attribute__((always_inline)) void tile(const element *a, long a_stride, const element *panel,
                                                       long pairs, const float *bias, int add, float *out,
                                                       long out_stride, const int R) {
    __m512 left[MOST_ROWS], right[MOST_ROWS];
    for (int r = 0; r < R; r++) left[r] = right[r] = _mm512_setzero_ps();
    for (long p = 0; p < pairs; p++) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + p * 64);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + p * 64 + 32);
        for (int r = 0; r < R; r++) {
            int32_t two;
            memcpy(&two, a + r * a_stride + 2 * p, sizeof two);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            left[r] = _mm512_dpbf16_ps(left[r], both, b0);
            right[r] = _mm512_dpbf16_ps(right[r], both, b1);
        }
    }
    for (int r = 0; r < R; r++) {
        float *to = out + r * out_stride;
        if (bias) {
            left[r] = _mm512_add_ps(left[r], _mm512_loadu_ps(bias));
            right[r] = _mm512_add_ps(right[r], _mm512_loadu_ps(bias + 16));
        }
        if (add) {
            left[r] = _mm512_add_ps(left[r], _mm512_loadu_ps(to));
            right[r] = _mm512_add_ps(right[r], _mm512_loadu_ps(to + 16));
        }
        _mm512_storeu_ps(to, left[r]);
        _mm512_storeu_ps(to + 16, right[r]);
    }
}

/* out[rows x N] (+)= a[rows x inner] W^T for the panels [from, to). `inner` is even. */
static void multiply(const element *a, long a_stride, const element *packed, long inner, const float *bias, int add,
                     float *out, long out_stride, long rows, long from, long to) {
    const long pairs = inner / 2;
    for (long n = from; n < to; n++) {
        const element *panel = packed + n * pairs * 64;
        const float *own = bias ? bias + n * COLUMNS : 0;
        float *column = out + n * COLUMNS;
        long r = 0;
        for (; r + MOST_ROWS <= rows; r += MOST_ROWS)
            tile(a + r * a_stride, a_stride, panel, pairs, own, add, column + r * out_stride, out_stride, MOST_ROWS);
        const element *rest = a + r * a_stride;
        float *last = column + r * out_stride;
        switch (rows - r) {
#define CASE(R) \
    case R: tile(rest, a_stride, panel, pairs, own, add, last, out_stride, R); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
#undef CASE
        default: break;
        }
    }
}

static inline float mean_square(const float *x, long n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += x[i] * x[i];
    return sum / (float)n;
}

static inline void norm_to_halves(const float *x, const float *weight, long n, float eps, element *out, element *rest) {
    const float scale = 1.0f / sqrtf(mean_square(x, n) + eps);
    for (long i = 0; i < n; i++) {
        const float y = x[i] * scale * weight[i];
        const element high = narrow(y);
        out[i] = high;
        if (rest) rest[i] = narrow(y - widen(high));
    }
}

/* RMSNorm of one head where the family has it, then the rotation of its two halves; to bf16. */
static inline void turn(float *head, const float *weight, const float *cosine, const float *sine, long K, float eps,
                        element *out) {
    if (weight) {
        const float scale = 1.0f / sqrtf(mean_square(head, K) + eps);
        for (long i = 0; i < K; i++) head[i] *= scale * weight[i];
    }
    const long half = K / 2;
    for (long i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        out[i] = narrow(a * cosine[i] - b * sine[i]);
        out[i + half] = narrow(b * cosine[i] + a * sine[i]);
    }
}

/* e^x for x <= 0; NaN stays NaN. */
static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    const __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f),
                                     _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
    __m512 y = _mm512_fmadd_ps(r, _mm512_set1_ps(8.33333333e-3f), _mm512_set1_ps(4.16666667e-2f));
    y = _mm512_fmadd_ps(r, y, _mm512_set1_ps(1.66666667e-1f));
    y = _mm512_fmadd_ps(r, y, _mm512_set1_ps(0.5f));
    y = _mm512_fmadd_ps(r, y, _mm512_set1_ps(1.0f));
    y = _mm512_fmadd_ps(r, y, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

/* The sums of sixteen vectors, side by side. */
static inline __attribute__((always_inline)) __m512 sums16(__m512 *v) {
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

static inline __m512 widen16(const element *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

enum { KEYS = 128 };

/* `attend` for heads of C x 32 numbers: scores sixteen keys at a time, softmax over blocks with a running maximum. */
static inline __attribute__((always_inline)) void attend_wide(const element *q, const element *keys,
                                                              const element *values, element *out, long first,
                                                              long end, const long G, const long C) {
    const long K = 32 * C;
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)K)), lowest = _mm512_set1_ps(-INFINITY);
    float scores[KEYS] __attribute__((aligned(64)));
    for (long g = 0; g < G; g++) {
        __m512bh query[4];
        __m512 sum[8];
        float top = -INFINITY, total = 0.0f;
        for (long c = 0; c < C; c++) query[c] = (__m512bh)_mm512_loadu_si512(q + g * K + 32 * c);
        for (long i = 0; i < 2 * C; i++) sum[i] = _mm512_setzero_ps();
        for (long start = first; start < end; start += KEYS) {
            const long num = end - start < KEYS ? end - start : KEYS;
            __m512 most = lowest;
            for (long t = 0; t < num; t += 16) {
                __m512 dots[16];
                for (long u = 0; u < 16; u++) {
                    dots[u] = _mm512_setzero_ps();
                    if (t + u < num)
                        for (long c = 0; c < C; c++)
                            dots[u] = _mm512_dpbf16_ps(
                                dots[u], query[c], (__m512bh)_mm512_loadu_si512(keys + (start + t + u) * K + 32 * c));
                }
                const __mmask16 there = num - t >= 16 ? 0xffff : (__mmask16)((1 << (num - t)) - 1);
                const __m512 score = _mm512_mask_mul_ps(lowest, there, sums16(dots), scale);
                _mm512_store_ps(scores + t, score);
                most = _mm512_max_ps(most, score);
            }
            const float best = fmaxf(top, _mm512_reduce_max_ps(most));
            const __m512 bests = _mm512_set1_ps(best);
            __m512 added = _mm512_setzero_ps();
            for (long t = 0; t < num; t += 16) {
                const __mmask16 there = num - t >= 16 ? 0xffff : (__mmask16)((1 << (num - t)) - 1);
                const __m512 weight = _mm512_maskz_mov_ps(there, exp16(_mm512_sub_ps(_mm512_load_ps(scores + t), bests)));
                _mm512_store_ps(scores + t, weight);
                added = _mm512_add_ps(added, weight);
            }
            if (start != first) {
                const float shrink = exp_nonpositive(top - best);
                total *= shrink;
                for (long i = 0; i < 2 * C; i++) sum[i] = _mm512_mul_ps(sum[i], _mm512_set1_ps(shrink));
            }
            total += _mm512_reduce_add_ps(added);
            top = best;
            for (long t = 0; t < num; t++) {
                const __m512 weight = _mm512_set1_ps(scores[t]);
                const element *value = values + (start + t) * K;
                for (long i = 0; i < 2 * C; i++) sum[i] = _mm512_fmadd_ps(weight, widen16(value + 16 * i), sum[i]);
            }
        }
        const __m512 share = _mm512_set1_ps(1.0f / total);
        for (long i = 0; i < 2 * C; i++)
            _mm256_storeu_si256((__m256i *)(out + g * K + 16 * i),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum[i], share)));
    }
}

static inline void attend_any(const element *q, const element *k, const element *v, element *out, long first, long end,
                              long G, long K) {
    if (K == 32) attend_wide(q, k, v, out, first, end, G, 1);
    else if (K == 64) attend_wide(q, k, v, out, first, end, G, 2);
    else if (K == 128) attend_wide(q, k, v, out, first, end, G, 4);
    else attend(q, k, v, out, first, end, G, K);
}

/* The key-value heads [from, to): rotate, write the cache, attend. s holds q, k and v side by side. */
static void attend_rows(const model_shape *m, const layer_weights *w, const call *c, long layer, long base, long rows,
                        float *s, long s_stride, element *halves, long h_stride, long from, long to) {
    const long K = m->head_dim, H = m->heads, J = m->kv_heads, G = H / J;
    element q[MOST_GROUP * MOST_WIDTH];
    for (long r = 0; r < rows; r++) {
        const long at = (long)c->positions[base + r], end = at + 1, slot = (long)c->slots[base + r];
        const long first = w->window > 0 && end > w->window ? end - w->window : 0;
        const float *cosine = m->cosines + at * (K / 2), *sine = m->sines + at * (K / 2);
        float *row = s + r * s_stride;
        for (long j = from; j < to; j++) {
            element *keys = c->keys[layer] + slot * c->slot_stride + j * c->head_stride;
            element *values = c->values[layer] + slot * c->slot_stride + j * c->head_stride;
            turn(row + (H + j) * K, w->k_norm, cosine, sine, K, (float)m->eps, keys + at * K);
            const float *v = row + (H + J + j) * K;
            for (long i = 0; i < K; i++) values[at * K + i] = narrow(v[i]);
            for (long g = 0; g < G; g++)
                turn(row + (j * G + g) * K, w->q_norm, cosine, sine, K, (float)m->eps, q + g * K);
            attend_any(q, keys, values, halves + r * h_stride + j * G * K, first, end, G, K);
        }
    }
}

/* silu(gate) * value for the columns [from, to) */
static void gate(const float *s, long s_stride, long mlp, element *halves, long h_stride, long rows, long from,
                 long to) {
    for (long r = 0; r < rows; r++) {
        const float *g = s + r * s_stride, *v = g + mlp;
        element *out = halves + r * h_stride;
#pragma omp simd
        for (long i = from; i < to; i++) {
            const float x = g[i], e = exp_nonpositive(x < 0.0f ? x : -x);
            out[i] = narrow((x < 0.0f ? e : 1.0f) / (1.0f + e) * x * v[i]);
        }
    }
}

static inline void share(long n, long parts, long part, long *from, long *to) {
    *from = n * part / parts;
    *to = n * (part + 1) / parts;
}

/* Some consecutive rows, TILE at most. `parts` threads do it together, or 1, whose own they are. */
static void run(const model_shape *m, const layer_weights *layers, const call *c, float *x, float *s, element *halves,
                element *mine, long base, long rows, long parts, long part) {
    const long D = m->width, K = m->head_dim, A = (m->heads + 2 * m->kv_heads) * K, O = m->heads * K, M = m->mlp;
    const long S = m->scratch_floats, B = m->scratch_halves;
    const float eps = (float)m->eps;
    long from, to, wanted = 0, output = -1;
#define WAIT()                 \
    if (parts > 1) {           \
        _Pragma("omp barrier") \
    }
    share(D, parts, part, &from, &to);
    for (long r = 0; r < rows; r++)
        for (long i = from; i < to; i++) x[r * D + i] = widen(m->embed[c->tokens[base + r] * D + i]);
    WAIT()
    for (long l = 0; l < m->layers; l++) {
        const layer_weights *w = layers + l;
        for (long r = 0; r < rows; r++) norm_to_halves(x + r * D, w->attention_norm, D, eps, mine + r * D, 0);
        share(padded(A) / COLUMNS, parts, part, &from, &to);
        multiply(mine, D, w->qkv, D, w->qkv_bias, 0, s, S, rows, from, to);
        WAIT()
        share(m->kv_heads, parts, part, &from, &to);
        attend_rows(m, w, c, l, base, rows, s, S, halves, B, from, to);
        WAIT()
        share(D / COLUMNS, parts, part, &from, &to);
        multiply(halves, B, w->out, O, w->out_bias, 1, x, D, rows, from, to);
        WAIT()
        for (long r = 0; r < rows; r++) norm_to_halves(x + r * D, w->mlp_norm, D, eps, mine + r * D, 0);
        share(padded(2 * M) / COLUMNS, parts, part, &from, &to);
        multiply(mine, D, w->up, D, w->up_bias, 0, s, S, rows, from, to);
        WAIT()
        share(M, parts, part, &from, &to);
        gate(s, S, M, halves, B, rows, from, to);
        WAIT()
        share(D / COLUMNS, parts, part, &from, &to);
        multiply(halves, B, w->down, M, w->down_bias, 1, x, D, rows, from, to);
        WAIT()
    }
    /* Rows that are to give logits stand in order, and so do their outputs. */
    element *rest = mine + rows * D;
    for (long r = 0; r < rows; r++) {
        if (c->outputs && c->outputs[base + r] < 0) continue;
        if (output < 0) output = c->outputs ? (long)c->outputs[base + r] : base + r;
        norm_to_halves(x + r * D, m->final_norm, D, eps, mine + wanted * D, rest + wanted * D);
        wanted++;
    }
    if (wanted) {
        float *logits = c->logits + output * c->logits_stride;
        share(padded(m->vocab) / COLUMNS, parts, part, &from, &to);
        multiply(mine, D, m->head, D, 0, 0, logits, c->logits_stride, wanted, from, to);
        multiply(rest, D, m->head, D, 0, 1, logits, c->logits_stride, wanted, from, to);
    }
    WAIT()
#undef WAIT
}

static inline long begins(const call *c, long sequence) {
    return c->sequences ? (long)c->sequences[sequence] : sequence;
}

/* Scratch for each thread, TILE rows of: x D floats, s scratch_floats floats, halves scratch_halves elements, mine 2 D
 * elements. Rows of logits have room for the vocabulary padded to 32. Returns 0, or 1 if the shape is not for this
 * kernel, with nothing done. */
int decode_step(const model_shape *m, const layer_weights *layers, const call *c, float *x, float *s, element *halves,
                element *mine, int threads) {
    const long D = m->width;
    if (D % COLUMNS || m->mlp % 2 || (m->heads * m->head_dim) % 2 || m->head_dim % 2 ||
        m->heads / m->kv_heads > MOST_GROUP || m->head_dim > MOST_WIDTH)
        return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
        const long part = omp_get_thread_num(), parts = omp_get_num_threads();
#else
        const long part = 0, parts = 1;
#endif
        const int together = parts > 1 && c->num_sequences < 4 * parts;
        const long block = together ? 0 : part;
        float *my_x = x + block * TILE * D, *my_s = s + block * TILE * m->scratch_floats;
        element *my_halves = halves + block * TILE * m->scratch_halves, *my_own = mine + part * 2 * TILE * D;
        long from = 0, to = (long)c->num_rows;
        if (!together) {
            /* Whole sequences, about as many rows for each thread. */
            long first = 0, last = 0;
            while (first < c->num_sequences && begins(c, first) < to * part / parts) first++;
            last = first;
            while (last < c->num_sequences && (part + 1 == parts || begins(c, last) < to * (part + 1) / parts)) last++;
            from = begins(c, first), to = begins(c, last);
        }
        for (long base = from; base < to; base += TILE)
            run(m, layers, c, my_x, my_s, my_halves, my_own, base, to - base < TILE ? to - base : TILE,
                together ? parts : 1, together ? part : 0);
    }
    return 0;
}

#else

int decode_step_supported(void) { return 0; }

int decode_step_tile(void) { return 0; }

int decode_step(const model_shape *m, const layer_weights *layers, const call *c, float *x, float *s, element *halves,
                element *mine, int threads) {
    (void)m, (void)layers, (void)c, (void)x, (void)s, (void)halves, (void)mine, (void)threads;
    return 1;
}

#endif
