/* Causal attention of bf16 sequences that lie end to end, forward and backward, where several may go on from one prefix.
 *
 * A segment is a run of tokens. A family is a few segments one after another: alone, a sequence; else the first is the
 * prefix of all others, which see it and themselves. Each family and key-value head is one piece of work, so that no two
 * threads write the same number. Products are of bf16 numbers, summed in fp32; softmax is in fp32, over chunks of keys with
 * a running maximum (Milakov and Gimelshein, 1805.02867); backward computes the weights again from the logarithm of their
 * sum (FlashAttention, 2205.14135). Rotary positions are applied on reading, in fp32.
 *
 * native.py compiles this with the machine's own C compiler; without AVX-512 bf16 `prefix_supported` says no.
 */
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#define BF16
#include "bf16_products.h"
#include "lanes.h"

enum {
    QUERIES = 12,             /* rows that are multiplied together */
    BLOCK = 4 * QUERIES,      /* queries of one sum over queries */
    TILE = 32,                /* keys that lie side by side */
    CHUNK = 3 * TILE,         /* keys of one pass of backward: a multiple of QUERIES too */
    REACH = 12 * TILE,        /* keys of one softmax, likewise */
    WIDEST = 128,             /* numbers of a head */
    QWORDS = WIDEST / 2       /* from query to query */
};

int prefix_supported(int width) { return width > 0 && width % TILE == 0 && width <= WIDEST; }

typedef struct {
    const bf16 *heads;      /* H query, J key, J value heads of K numbers a token */
    const float *cos, *sin; /* K numbers a token, the first half of sin negated; cos == 0: no rotary positions */
    const int64_t *starts;  /* of the segments, and the end of the last */
    const int64_t *firsts;  /* first segment of each family, and the number of all */
    long families, H, J, K;
} task;

static inline long tiles_of(long keys) { return (keys + TILE - 1) / TILE; }

/* c[12][32] (+)= twelve rows times 32 columns, over pairs. Constant strides of A make its addresses cheap. */
static inline __attribute__((always_inline)) void product(const uint32_t *a, const long a_row, const long a_pair,
                                                          const uint32_t *b, long b_pair, long pairs, float *c,
                                                          long c_row, int add) {
    __m512 sums[QUERIES][2];
#pragma GCC unroll 12
    for (int r = 0; r < QUERIES; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * b_pair);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k * b_pair + 16);
#pragma GCC unroll 12
        for (int r = 0; r < QUERIES; r++) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32((int)a[r * a_row + k * a_pair]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, b0);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, b1);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < QUERIES; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            float *to = c + r * c_row + 16 * h;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(sums[r][h], _mm512_loadu_ps(to)) : sums[r][h]);
        }
}

/* Scores of twelve queries (or anything whose rows lie QWORDS apart) and the keys of a few tiles. */
static void score(const uint32_t *rows, const uint32_t *panels, long tiles, long K, float *to, long stride) {
    for (long t = 0; t < tiles; t++)
        product(rows, QWORDS, 1, panels + t * TILE * K / 2, TILE, K / 2, to + t * TILE, stride, 0);
}

/* out[12][K] += weights[12][keys] times rows of keys, zipped two by two. */
static inline __attribute__((always_inline)) void weigh(const bf16 *weights, const long stride, const uint32_t *zipped,
                                                        long tiles, long K, float *out) {
    for (long c = 0; c < K; c += TILE)
        product((const uint32_t *)weights, stride / 2, 1, zipped + c, K, tiles * TILE / 2, out + c, K, 1);
}

/* sums[keys][K] += turned weights times rows of queries, both zipped two by two. */
static void spread(const uint32_t *turned, const uint32_t *zipped, long keys, long K, float *sums) {
    for (long key = 0; key < keys; key += QUERIES)
        for (long c = 0; c < K; c += TILE)
            product(turned + key, 1, CHUNK, zipped + c, K, BLOCK / 2, sums + key * K + c, K, 1);
}

/* One head of one token, turned by its position, times scale, as bf16. */
static inline void read_head(const task *t, long token, long head, int turning, float scale, bf16 *to) {
    const bf16 *from = t->heads + (token * (t->H + 2 * t->J) + head) * t->K;
    const long K = t->K, half = K / 2;
    const float *cos = t->cos + token * K, *sin = t->sin + token * K;
    if (turning && t->cos)
        for (long i = 0; i < half; i += LANES) {
            const lanes a = load_e(from + i) * scale, b = load_e(from + i + half) * scale;
            store_e(to + i, a * load(cos + i) + b * load(sin + i));
            store_e(to + i + half, b * load(cos + i + half) + a * load(sin + i + half));
        }
    else
        for (long i = 0; i < K; i += LANES) store_e(to + i, load_e(from + i) * scale);
}

/* The reverse: a head's gradient goes to its place, turned back. */
static inline void write_gradient(const task *t, bf16 *grads, long token, long head, int turning, float scale,
                                  const float *from) {
    bf16 *to = grads + (token * (t->H + 2 * t->J) + head) * t->K;
    const long K = t->K, half = K / 2;
    const float *cos = t->cos + token * K, *sin = t->sin + token * K;
    if (turning && t->cos)
        for (long i = 0; i < half; i += LANES) {
            const lanes a = load(from + i) * scale, b = load(from + i + half) * scale;
            store_e(to + i, a * load(cos + i) + b * load(sin + i + half));
            store_e(to + i + half, b * load(cos + i + half) + a * load(sin + i));
        }
    else
        for (long i = 0; i < K; i += LANES) store_e(to + i, load(from + i) * scale);
}

/* words[k][i] = (rows[2k][i], rows[2k + 1][i]) of `num` (even) rows of `width` numbers; columns lie `apart`. */
static inline void zip(const bf16 *rows, long stride, long num, long width, uint32_t *words, long apart) {
    for (long k = 0; k < num / 2; k++) zip_rows(rows + 2 * k * stride, rows + (2 * k + 1) * stride, words + k * apart, width);
}

/* Keys or values of a family, both ways: panels of tiles side by side, and zipped rows (either may be unwanted). Segments
 * begin with a tile of their own; what fills their last tile up is zeros. */
static void read_rows(const task *t, long family, long head, int turning, uint32_t *panels, uint32_t *zipped) {
    const long K = t->K;
    bf16 rows[TILE * WIDEST];
    for (long s = (long)t->firsts[family]; s < (long)t->firsts[family + 1]; s++)
        for (long at = (long)t->starts[s]; at < (long)t->starts[s + 1]; at += TILE) {
            const long num = least(TILE, (long)t->starts[s + 1] - at);
            for (long i = 0; i < num; i++) read_head(t, at + i, head, turning, 1.0f, rows + i * K);
            memset(rows + num * K, 0, (size_t)((TILE - num) * K) * sizeof(bf16));
            if (panels) {
                pack_turned_rows(rows, 0, K, K, TILE, 0, TILE, panels);
                panels += TILE * K / 2;
            }
            if (zipped) {
                zip(rows, K, TILE, K, zipped, K);
                zipped += TILE * K / 2;
            }
        }
}

/* What lies behind the last key that a row sees becomes -infinity. */
static inline void hide(float *row, long from, long width, long last) {
    const long seen = last - from + 1; /* of this row's columns */
    for (long c = seen > 0 ? seen / LANES * LANES : 0; c < width; c += LANES)
        store(row + c, choose(counting((float)(from + c)) > (float)last, all(-INFINITY), load(row + c)));
}

/* Keys that a query's segment sees: those of the prefix, all of them, or its own, up to itself. */
typedef struct {
    long tile, keys; /* the first tile, and how many keys */
    int own;
} span;

static int spans_of(const task *t, long family, long segment, long tile, span found[2]) {
    const long first = (long)t->firsts[family], length = (long)(t->starts[segment + 1] - t->starts[segment]);
    int num = 0;
    if (segment > first) found[num++] = (span){0, (long)(t->starts[first + 1] - t->starts[first]), 0};
    found[num++] = (span){tile, length, 1};
    return num;
}

/* The softmax of a chunk's scores, with running maximum and sum; weights in bf16. Rows of `out` are scaled down. */
static inline void soften(float *scores, long width, float *top, float *total, bf16 *weights, float *out, long K) {
    lanes most = load(scores);
    for (long c = LANES; c < width; c += LANES) most = (lanes)_mm512_max_ps((__m512)most, (__m512)load(scores + c));
    const float here = _mm512_reduce_max_ps((__m512)most);
    float best = here > *top ? here : *top;
    if (best == -INFINITY) best = -1e30f; /* nothing seen in this chunk yet */
    const float shrink = *total > 0.0f ? expf(*top - best) : 0.0f;
    lanes added = {};
    for (long c = 0; c < width; c += LANES) {
        const lanes weight = exp_of(load(scores + c) - best);
        store_e(weights + c, weight);
        added += weight;
    }
    if (*total > 0.0f && shrink != 1.0f)
        for (long i = 0; i < K; i += LANES) store(out + i, load(out + i) * shrink);
    *total = *total * shrink + _mm512_reduce_add_ps((__m512)added);
    *top = best;
}

/* Twelve queries of one head. */
static void attend(const uint32_t *queries, const span *spans, int num, long first, long last, const uint32_t *keys,
                   const uint32_t *values, float *out, float *lse, long K) {
    float scores[QUERIES * REACH], top[QUERIES], total[QUERIES];
    bf16 weights[QUERIES * REACH];
    for (int r = 0; r < QUERIES; r++) top[r] = -INFINITY, total[r] = 0.0f;
    memset(out, 0, (size_t)(QUERIES * K) * sizeof(float));
    for (int s = 0; s < num; s++) {
        const long end = spans[s].own ? last + 1 : spans[s].keys;
        for (long start = 0; start < end; start += REACH) {
            const long tiles = tiles_of(least(REACH, end - start)), width = tiles * TILE;
            const long at = (spans[s].tile * TILE + start) * K / 2;
            score(queries, keys + at, tiles, K, scores, REACH);
            for (long r = 0; r < QUERIES; r++) {
                const long seen = spans[s].own ? least(first + r, last) : spans[s].keys - 1;
                if (start + width - 1 > seen) hide(scores + r * REACH, start, width, seen);
                soften(scores + r * REACH, width, top + r, total + r, weights + r * REACH, out + r * K, K);
            }
            weigh(weights, REACH, values + at, tiles, K, out);
        }
    }
    for (int r = 0; r < QUERIES; r++) {
        lse[r] = top[r] + logf(total[r]);
        for (long i = 0; i < K; i += LANES) store(out + r * K + i, load(out + r * K + i) / total[r]);
    }
}

static void forward(const task *t, long item, bf16 *out, float *lse, uint32_t *scratch, long words) {
    const long family = item / t->J, j = item % t->J, G = t->H / t->J, K = t->K;
    uint32_t *keys = scratch, *values = keys + words;
    uint32_t queries[QUERIES * QWORDS];
    float sums[QUERIES * WIDEST], logs[QUERIES];
    const float scale = 1.0f / sqrtf((float)K);
    read_rows(t, family, t->H + j, 1, keys, 0);
    read_rows(t, family, t->H + t->J + j, 0, 0, values);
    long tile = 0;
    for (long s = (long)t->firsts[family]; s < (long)t->firsts[family + 1]; s++) {
        const long start = (long)t->starts[s], length = (long)t->starts[s + 1] - start;
        span spans[2];
        const int num = spans_of(t, family, s, tile, spans);
        for (long h = j * G; h < (j + 1) * G; h++)
            for (long i = 0; i < length; i += QUERIES) {
                const long rows = least(QUERIES, length - i);
                for (long r = 0; r < QUERIES; r++)
                    read_head(t, start + i + least(r, rows - 1), h, 1, scale, (bf16 *)(queries + r * QWORDS));
                attend(queries, spans, num, i, i + rows - 1, keys, values, sums, logs, K);
                for (long r = 0; r < rows; r++) {
                    bf16 *to = out + ((start + i + r) * t->H + h) * K;
                    for (long c = 0; c < K; c += LANES) store_e(to + c, load(sums + r * K + c));
                    lse[(start + i + r) * t->H + h] = logs[r];
                }
            }
        tile += tiles_of(length);
    }
}

/* What a block of queries of one head brings to the sums over queries and over keys. */
typedef struct {
    uint32_t queries[BLOCK * QWORDS], pulls[BLOCK * QWORDS];           /* rows of bf16 */
    uint32_t zipped_queries[BLOCK / 2 * WIDEST], zipped_pulls[BLOCK / 2 * WIDEST];
    float logs[BLOCK], delta[BLOCK], grads[BLOCK * WIDEST];
    float scores[QUERIES * CHUNK], changes[QUERIES * CHUNK];
    bf16 weights[BLOCK * CHUNK], slopes[BLOCK * CHUNK];
    uint32_t turned[BLOCK / 2 * CHUNK];
} block;

/* The weights of a chunk's keys and their slopes, for twelve queries of the block, in bf16. */
static void slopes_of(block *b, long row, const uint32_t *keys, const uint32_t *values, long tiles, long K,
                      const long seen[QUERIES], long start) {
    const long width = tiles * TILE;
    score(b->queries + row * QWORDS, keys, tiles, K, b->scores, CHUNK);
    score(b->pulls + row * QWORDS, values, tiles, K, b->changes, CHUNK);
    for (long r = 0; r < QUERIES; r++) {
        float *weight = b->scores + r * CHUNK, *change = b->changes + r * CHUNK;
        if (start + width - 1 > seen[r]) hide(weight, start, width, seen[r]);
        for (long c = 0; c < width; c += LANES) {
            const lanes p = exp_of(load(weight + c) - b->logs[row + r]);
            store_e(b->weights + (row + r) * CHUNK + c, p);
            store_e(b->slopes + (row + r) * CHUNK + c, p * (load(change + c) - b->delta[row + r]));
        }
    }
}

/* A family's keys and values in all the forms that backward needs, and their gradients. */
typedef struct {
    uint32_t *key_panels, *key_rows, *value_panels;
    float *grad_keys, *grad_values;
} family_rows;

static void pull_block(block *b, const span *spans, int num, long first, long rows, const family_rows *f, long K) {
    const long tiled = (rows + QUERIES - 1) / QUERIES * QUERIES;
    for (int s = 0; s < num; s++) {
        const long end = spans[s].own ? first + rows : spans[s].keys;
        for (long start = 0; start < end; start += CHUNK) {
            const long tiles = tiles_of(least(CHUNK, end - start)), width = tiles * TILE;
            const long key = spans[s].tile * TILE + start, at = key * K / 2;
            for (long row = 0; row < BLOCK; row += QUERIES) {
                const long lowest = first + row, highest = first + least(row + QUERIES, rows) - 1;
                long near = row < tiled ? tiles : 0, seen[QUERIES]; /* tiles of which a query sees something */
                if (near && spans[s].own) near = highest < start ? 0 : least(tiles, (highest - start) / TILE + 1);
                for (long r = 0; r < QUERIES; r++)
                    seen[r] = row + r >= rows ? -1 : spans[s].own ? lowest + r : spans[s].keys - 1;
                if (near < CHUNK / TILE)
                    for (long r = row; r < row + QUERIES; r++) {
                        const size_t rest = (size_t)(CHUNK - near * TILE) * sizeof(bf16);
                        memset(b->weights + r * CHUNK + near * TILE, 0, rest);
                        memset(b->slopes + r * CHUNK + near * TILE, 0, rest);
                    }
                if (!near) continue;
                slopes_of(b, row, f->key_panels + at, f->value_panels + at, near, K, seen, start);
                weigh(b->slopes + row * CHUNK, CHUNK, f->key_rows + at, near, K, b->grads + row * K);
            }
            zip(b->slopes, CHUNK, BLOCK, CHUNK, b->turned, CHUNK);
            spread(b->turned, b->zipped_queries, width, K, f->grad_keys + key * K);
            zip(b->weights, CHUNK, BLOCK, CHUNK, b->turned, CHUNK);
            spread(b->turned, b->zipped_pulls, width, K, f->grad_values + key * K);
        }
    }
}

/* Queries, gradients of their outputs and what else a block needs; rows that are missing are zeros. */
static void read_block(const task *t, block *b, long start, long rows, long head, float scale, const bf16 *out,
                       const float *lse, const bf16 *grad_out) {
    const long K = t->K;
    for (long r = 0; r < BLOCK; r++) {
        bf16 *query = (bf16 *)(b->queries + r * QWORDS), *pull = (bf16 *)(b->pulls + r * QWORDS);
        if (r >= rows) {
            memset(query, 0, (size_t)K * sizeof(bf16));
            memset(pull, 0, (size_t)K * sizeof(bf16));
            b->logs[r] = b->delta[r] = 0.0f;
            continue;
        }
        const long at = ((start + r) * t->H + head) * K;
        lanes sums = {};
        for (long i = 0; i < K; i += LANES) sums += load_e(grad_out + at + i) * load_e(out + at + i);
        memcpy(pull, grad_out + at, (size_t)K * sizeof(bf16));
        read_head(t, start + r, head, 1, scale, query);
        b->logs[r] = lse[(start + r) * t->H + head];
        b->delta[r] = sum_of(sums);
    }
    zip((const bf16 *)b->queries, 2 * QWORDS, BLOCK, K, b->zipped_queries, K);
    zip((const bf16 *)b->pulls, 2 * QWORDS, BLOCK, K, b->zipped_pulls, K);
    memset(b->grads, 0, (size_t)(BLOCK * K) * sizeof(float));
}

static void backward(const task *t, long item, const bf16 *out, const float *lse, const bf16 *grad_out, bf16 *grads,
                     uint32_t *scratch, long words) {
    const long family = item / t->J, j = item % t->J, G = t->H / t->J, K = t->K;
    const family_rows f = {scratch, scratch + words, scratch + 2 * words, (float *)(scratch + 3 * words),
                           (float *)(scratch + 5 * words)};
    const float scale = 1.0f / sqrtf((float)K);
    block b;
    read_rows(t, family, t->H + j, 1, f.key_panels, f.key_rows);
    read_rows(t, family, t->H + t->J + j, 0, f.value_panels, 0);
    memset(f.grad_keys, 0, (size_t)(4 * words) * sizeof(float));
    long tile = 0;
    for (long s = (long)t->firsts[family]; s < (long)t->firsts[family + 1]; s++) {
        const long start = (long)t->starts[s], length = (long)t->starts[s + 1] - start;
        span spans[2];
        const int num = spans_of(t, family, s, tile, spans);
        for (long h = j * G; h < (j + 1) * G; h++)
            for (long i = 0; i < length; i += BLOCK) {
                const long rows = least(BLOCK, length - i);
                read_block(t, &b, start + i, rows, h, scale, out, lse, grad_out);
                pull_block(&b, spans, num, i, rows, &f, K);
                for (long r = 0; r < rows; r++) write_gradient(t, grads, start + i + r, h, 1, scale, b.grads + r * K);
            }
        tile += tiles_of(length);
    }
    tile = 0;
    for (long s = (long)t->firsts[family]; s < (long)t->firsts[family + 1]; s++) {
        const long start = (long)t->starts[s], length = (long)t->starts[s + 1] - start;
        for (long i = 0; i < length; i++) {
            write_gradient(t, grads, start + i, t->H + j, 1, 1.0f, f.grad_keys + (tile * TILE + i) * K);
            write_gradient(t, grads, start + i, t->H + t->J + j, 0, 1.0f, f.grad_values + (tile * TILE + i) * K);
        }
        tile += tiles_of(length);
    }
}

/* Words of the largest family's keys in one form; with a little room, for sums go a few rows past the last key. */
static long words_needed(const task *t) {
    long most = 0;
    for (long family = 0; family < t->families; family++) {
        long tiles = 0;
        for (long s = (long)t->firsts[family]; s < (long)t->firsts[family + 1]; s++)
            tiles += tiles_of((long)(t->starts[s + 1] - t->starts[s]));
        if (tiles > most) most = tiles;
    }
    return (most + 1) * TILE * t->K / 2;
}

/* Both return 0, or 1 where memory ran out. `out` has H x K numbers a token, `lse` H. */
int prefix_attention(const bf16 *heads, const float *cos, const float *sin, const int64_t *starts,
                     const int64_t *firsts, long families, long H, long J, long K, bf16 *out, float *lse,
                     int threads) {
    const task t = {heads, cos, sin, starts, firsts, families, H, J, K};
    const long words = words_needed(&t);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint32_t *scratch = kept_words((size_t)(2 * words));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < families * J; item++)
            if (scratch) forward(&t, item, out, lse, scratch, words);
    }
    return failed;
}

int prefix_attention_backward(const bf16 *heads, const float *cos, const float *sin, const int64_t *starts,
                              const int64_t *firsts, long families, long H, long J, long K, const bf16 *out,
                              const float *lse, const bf16 *grad_out, bf16 *grads, int threads) {
    const task t = {heads, cos, sin, starts, firsts, families, H, J, K};
    const long words = words_needed(&t);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint32_t *scratch = kept_words((size_t)(7 * words));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < families * J; item++)
            if (scratch) backward(&t, item, out, lse, grad_out, grads, scratch, words);
    }
    return failed;
}
#else
int prefix_supported(int width) { return 0 * width; }
#endif
