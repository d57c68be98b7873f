/* Tokens through a whole decoder, one for every running row or all of some prompts, on a CPU with AVX-512 bf16.
 *
 * For RMSNorm-before, rotary, gated-SiLU decoders with bf16 weights (Llama, Mistral, Qwen2, Qwen3). The residual
 * stream, norms, rotary positions, softmax and the MLP's gate are fp32; matrix products take bf16 and add up in fp32;
 * keys and values are kept in bf16. Logits are fp32 sums of the bf16 products of the rounded last state, as the
 * trainer's are.
 *
 * A row is a token; rows of one sequence follow one another, so that a later one finds the keys of those before it in the
 * cache. Sequences are independent: with many of them each thread takes some through all layers and meets nobody, TILE
 * rows at a time. With few, the threads share every row's columns and heads, and wait for each other after each phase. A
 * row's result is the same either way and whoever else is in the batch: every sum is over one row, in one order.
 *
 * compiled.py packs the weights: 32 output columns side by side, two inputs at a time; of the gate and the values of an
 * MLP 16 of each to a panel. With -DTIMES the first thread counts the cycles of each phase.
 */
#define BF16
#include "elements.h"

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

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "block_attention.h"
#include "truncate.h"

int decode_step_supported(void) { return 1; }

enum { TILE = 128, AHEAD = 4, CACHED = 16 << 20 /* bytes of weights that stay in a shared cache */ };

int decode_step_tile(void) { return TILE; }

int decode_step_block(void) { return BLOCK; }

int decode_step_span(void) { return SPAN; }

/* The rows of one call: token, place of its sequence, position, and which output it is to give, or -1. */
typedef struct {
    const int64_t *tokens, *places, *positions, *outputs;
    const int64_t *sequences; /* where each sequence begins, and the end of the last; NULL: each row is one */
    int64_t num_rows, num_sequences;
    const place *all_places;
    float *logits; /* rows of logits_stride numbers */
    int64_t logits_stride;
    const int64_t *kept; /* of each output: the row that its logits go to, or -1; NULL: row o for output o */
    const draws *draw;   /* NULL: no tokens are wanted */
} call;

enum { EMBEDDING, NORMS, PRODUCTS, ATTENTION, HEAD, WAITING, PHASES };
#ifdef TIMES
static int64_t times[PHASES];
#define CLOCK(phase) if (part == 0 && first_thread) { const int64_t now = (int64_t)__builtin_ia32_rdtsc(); times[phase] += now - since; since = now; }
#define START_CLOCK int64_t since = (int64_t)__builtin_ia32_rdtsc();
int64_t decode_step_time(int phase) { return times[phase]; }
#else
#define CLOCK(phase) (void)0;
#define START_CLOCK (void)0;
#endif

/* RMSNorm of one head where the family has it, then the rotation of its two halves; to bf16. */
static inline void turn(float *head, const float *weight, const float *cosine, const float *sine, long K, float eps,
                        element *out) {
    if (weight) {
        const float scale = inverse_size(head, K, eps);
        for (long i = 0; i < K; i++) head[i] *= scale * weight[i];
    }
    const long half = K / 2;
    for (long i = 0; i < half; i += 16) {
        const __mmask16 there = lanes(half - i);
        const __m512 a = _mm512_maskz_loadu_ps(there, head + i), b = _mm512_maskz_loadu_ps(there, head + half + i);
        const __m512 x = _mm512_maskz_loadu_ps(there, cosine + i), y = _mm512_maskz_loadu_ps(there, sine + i);
        _mm256_mask_storeu_epi16(out + i, there, narrow16(_mm512_fmsub_ps(a, x, _mm512_mul_ps(b, y))));
        _mm256_mask_storeu_epi16(out + half + i, there, narrow16(_mm512_fmadd_ps(b, x, _mm512_mul_ps(a, y))));
    }
}

/* A way through the blocks that some rows attend to with one key-value head. Rows of one sequence, or siblings, are a
 * group: first the blocks that all of it shares, then those of each sequence. */
typedef struct {
    const call *c;
    const layer_weights *w;
    const head_shape *h;
    long layer, head, base, rows, most_rows;
    long start, end, first; /* rows of the group, and the first token that any of them sees */
    long from, to, next;    /* rows of this visit, and where the next sequence begins */
    long block, stop;
    const place *p;
} walk;

static inline void walk_to_group(walk *k) {
    const call *c = k->c;
    const int64_t *places = c->places + k->base, *positions = c->positions + k->base;
    const long start = k->end, window = (long)k->w->window;
    const place *p = c->all_places + places[start];
    long end = start + 1, lowest = (long)positions[start];
    for (; end < k->rows && end - start < k->most_rows; end++) {
        const place *other = c->all_places + places[end];
        if (other != p && !(p->num_shared && other->shared == p->shared && other->num_shared == p->num_shared)) break;
        lowest = least(lowest, (long)positions[end]);
    }
    k->start = k->from = k->next = start, k->end = k->to = end;
    k->first = window > 0 && lowest + 1 > window ? lowest + 1 - window : 0;
    k->p = p, k->block = k->first / BLOCK, k->stop = (long)p->num_shared;
}

/* On to the next block; 0 where there is none. */
static inline int walk_on(walk *k) {
    k->block++;
    while (k->block >= k->stop) {
        if (k->next == k->end) {
            if (k->end == k->rows) return 0;
            walk_to_group(k);
            continue;
        }
        const int64_t *places = k->c->places + k->base;
        k->from = k->next;
        for (k->to = k->from + 1; k->to < k->end && places[k->to] == places[k->from];) k->to++;
        k->next = k->to;
        k->p = k->c->all_places + places[k->from];
        k->block = most(k->first / BLOCK, (long)k->p->num_shared);
        k->stop = (long)k->c->positions[k->base + k->to - 1] / BLOCK + 1;
    }
    return 1;
}

/* The queries of a group, rotated, with nothing seen yet. */
static inline void open_group(const model_shape *m, const walk *k, queries *s, float *qkv, long stride) {
    const long K = k->h->K, G = m->heads / m->kv_heads, num = (k->end - k->start) * G, window = (long)k->w->window;
    for (long i = 0; i < num; i++) {
        const long row = k->start + i / G, at = (long)k->c->positions[k->base + row];
        turn(qkv + row * stride + (k->head * G + i % G) * K, k->w->q_norm, m->cosines + at * (K / 2),
             m->sines + at * (K / 2), K, (float)m->eps, s->q + i * K);
        s->end[i] = at + 1;
        s->first[i] = window > 0 && at + 1 > window ? at + 1 - window : 0;
        s->top[i] = -INFINITY;
    }
    memset(s->out, 0, (size_t)(num * k->h->P) * sizeof(float));
    memset(s->total, 0, (size_t)(num * 16) * sizeof(float));
}

/* The key-value heads [from, to): rotate, write the keys and values, attend. qkv holds q, k and v side by side. */
static void attend_rows(const model_shape *m, const layer_weights *w, const call *c, long layer, long base, long rows,
                        float *qkv, long stride, element *halves, long h_stride, long from, long to) {
    const long K = m->head_dim, H = m->heads, J = m->kv_heads, G = H / J;
    const head_shape h = {K, padded(K), J};
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)K));
    element key[MOST_WIDTH];
    queries s;
    for (long j = from; j < to; j++) {
        for (long r = 0; r < rows; r++) {
            const long at = (long)c->positions[base + r];
            const place *own = c->all_places + c->places[base + r];
            float *row = qkv + r * stride;
            turn(row + (H + j) * K, w->k_norm, m->cosines + at * (K / 2), m->sines + at * (K / 2), K, (float)m->eps,
                 key);
            put_key(home(&h, own, layer, 0, j, at / BLOCK), at % BLOCK, key, K);
            put_value(home(&h, own, layer, 1, j, at / BLOCK), at % BLOCK, row + (H + J + j) * K, K);
        }
        walk now = {.c = c, .w = w, .h = &h, .layer = layer, .head = j, .base = base, .rows = rows,
                    .most_rows = most(1, QUERIES / G), .block = -1};
        walk later = now;
        const element *later_keys = (const element *)&s, *later_values = later_keys;
        int more = 1;
        for (int i = 0; i < AHEAD && more; i++) more = walk_on(&later);
        for (long group = -1; walk_on(&now);) {
            if (group != now.start) open_group(m, &now, &s, qkv, stride);
            group = now.start;
            if (more) more = walk_on(&later);
            if (more) {
                later_keys = home(&h, later.p, layer, 0, j, later.block);
                later_values = home(&h, later.p, layer, 1, j, later.block);
            }
            attend_block(&s, (now.from - group) * G, (now.to - group) * G, now.block,
                         home(&h, now.p, layer, 0, j, now.block), home(&h, now.p, layer, 1, j, now.block), later_keys,
                         later_values, &h, scale);
            if (now.block + 1 == now.stop && now.next == now.end && (now.p->num_shared <= now.block))
                for (long i = 0; i < (now.end - group) * G; i++)
                    finish(&s, i, K, h.P, halves + (group + i / G) * h_stride + (j * G + i % G) * K);
        }
    }
}

static inline void share(long n, long parts, long part, long *from, long *to) {
    *from = n * part / parts;
    *to = n * (part + 1) / parts;
}

/* One output's token, its chunks noted. */
static void draw_one(const model_shape *m, const call *c, long o, const element *state, float *z) {
    const draws *d = c->draw;
    const choice found = choose_chunk(d, o);
    const float *logits = c->kept[o] < 0 ? 0 : c->logits + c->kept[o] * c->logits_stride;
    if (!found.valid) {
        write_down(d, o, &found, 0, 0.0f);
        return;
    }
    if (truncated(d, o)) {
        bins b;
        candidate *room = malloc((size_t)m->vocab * sizeof *room);
        if (room) draw_truncated(d, o, &found, logits, (long)m->vocab, &b, room);
        else d->valid[o] = 0;
        free(room);
        return;
    }
    const long start = found.chunk * SPAN, num = least(SPAN, (long)m->vocab - start), D = (long)m->width;
    const float *here = logits ? logits + start : z;
    if (!logits)
        product(state, D, m->head + start * D, D, 0, z, SPAN, 1, 0, padded(num) / COLUMNS);
    const long token = choose_token(d, o, &found, here, num);
    write_down(d, o, &found, start + token, here[token]);
}

/* Logits of `wanted` outputs from `output` on, whose states are in `mine`; or what is drawn from them. */
static void run_head(const model_shape *m, const call *c, const element *mine, long wanted, long output, long parts,
                     long part) {
    const long D = m->width, panels = padded(m->vocab) / COLUMNS;
    float z[TILE * SPAN] __attribute__((aligned(64)));
    long from, to;
    if (!c->draw) {
        share(panels, parts, part, &from, &to);
        product(mine, D, m->head, D, 0, c->logits + output * c->logits_stride, c->logits_stride, wanted, from, to);
        return;
    }
    share((long)c->draw->num_chunks, parts, part, &from, &to);
    for (long chunk = from; chunk < to; chunk++) {
        const long start = chunk * SPAN, num = least(SPAN, (long)m->vocab - start);
        product(mine, D, m->head + start * D, D, 0, z, SPAN, wanted, 0, padded(num) / COLUMNS);
        for (long r = 0; r < wanted; r++) {
            const int64_t row = c->kept[output + r];
            note_chunk(c->draw, output + r, chunk, z + r * SPAN, num);
            if (row >= 0) memcpy(c->logits + row * c->logits_stride + start, z + r * SPAN, (size_t)num * sizeof(float));
        }
    }
    if (parts > 1) {
#pragma omp barrier
    }
    share(wanted, parts, part, &from, &to);
    for (long r = from; r < to; r++) draw_one(m, c, output + r, mine + r * D, z);
}

/* Some consecutive rows, TILE at most. `parts` threads do it together, or 1, whose own they are. */
static void run(const model_shape *m, const layer_weights *layers, const call *c, float *x, float *s, element *halves,
                element *mine, long base, long rows, long parts, long part, int first_thread) {
    const long D = m->width, K = m->head_dim, A = (m->heads + 2 * m->kv_heads) * K, O = m->heads * K, M = m->mlp;
    const long S = m->scratch_floats, B = m->scratch_halves;
    const float eps = (float)m->eps;
    long from, to, wanted = 0, output = -1;
    (void)first_thread;
    START_CLOCK
#define WAIT()                 \
    if (parts > 1) {           \
        _Pragma("omp barrier") \
        CLOCK(WAITING)         \
    }
    share(D / 16, parts, part, &from, &to);
    for (long r = 0; r < rows; r++)
        for (long i = 16 * from; i < 16 * to; i += 16)
            _mm512_storeu_ps(x + r * D + i, load16(m->embed + c->tokens[base + r] * D + i));
    CLOCK(EMBEDDING)
    WAIT()
    for (long l = 0; l < m->layers; l++) {
        const layer_weights *w = layers + l;
        for (long r = 0; r < rows; r++) norm(x + r * D, w->attention_norm, D, eps, mine + r * D);
        CLOCK(NORMS)
        share(padded(A) / COLUMNS, parts, part, &from, &to);
        product(mine, D, w->qkv, D, w->qkv_bias, s, S, rows, from, to);
        CLOCK(PRODUCTS)
        WAIT()
        share(m->kv_heads, parts, part, &from, &to);
        attend_rows(m, w, c, l, base, rows, s, S, halves, B, from, to);
        CLOCK(ATTENTION)
        WAIT()
        share(D / COLUMNS, parts, part, &from, &to);
        product_added(halves, B, w->out, O, w->out_bias, x, D, rows, from, to);
        CLOCK(PRODUCTS)
        WAIT()
        for (long r = 0; r < rows; r++) norm(x + r * D, w->mlp_norm, D, eps, mine + r * D);
        CLOCK(NORMS)
        share((M + 15) / 16, parts, part, &from, &to);
        product_gated(mine, D, w->up, D, w->up_bias, halves, B, rows, from, to);
        CLOCK(PRODUCTS)
        WAIT()
        share(D / COLUMNS, parts, part, &from, &to);
        product_added(halves, B, w->down, M, w->down_bias, x, D, rows, from, to);
        CLOCK(PRODUCTS)
        WAIT()
    }
    /* Rows that are to give an output stand in order, and so do their outputs. */
    for (long r = 0; r < rows; r++) {
        if (c->outputs && c->outputs[base + r] < 0) continue;
        if (output < 0) output = c->outputs ? (long)c->outputs[base + r] : base + r;
        norm(x + r * D, m->final_norm, D, eps, mine + wanted * D);
        wanted++;
    }
    if (wanted) run_head(m, c, mine, wanted, output, parts, part);
    CLOCK(HEAD)
    WAIT()
#undef WAIT
}

static inline long begins(const call *c, long sequence) {
    return c->sequences ? (long)c->sequences[sequence] : sequence;
}

/* Whether the threads do all rows together. Prompts: if there are too few to share out. Single tokens: if their products
 * are fewer than what it takes to read the weights from memory, which is then read once instead of by each thread. */
static inline int is_shared_work(const model_shape *m, const call *c, long parts) {
    const long A = (m->heads + 2 * m->kv_heads) * m->head_dim, O = m->heads * m->head_dim;
    const long numbers = m->layers * m->width * (A + O + 3 * m->mlp) + m->vocab * m->width;
    const long few = c->sequences ? 4 : numbers * (long)sizeof(element) > CACHED ? 20 : 1;
    return parts > 1 && c->num_sequences < few * parts;
}

/* Scratch for each thread, TILE rows of: x D floats, s scratch_floats floats, halves scratch_halves elements, mine D
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
        const int together = is_shared_work(m, c, parts);
        const long block = together ? 0 : part;
        float *my_x = x + block * TILE * D, *my_s = s + block * TILE * m->scratch_floats;
        element *my_halves = halves + block * TILE * m->scratch_halves, *my_own = mine + part * TILE * D;
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
                together ? parts : 1, together ? part : 0, part == 0);
    }
    return 0;
}

/* Draw for outputs whose logits are in memory: output o's begin at rows[o]. */
void draw_rows(const model_shape *m, const draws *d, const float *const *rows, long num, int threads) {
    (void)threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && num > 1)
    for (long o = 0; o < num; o++) {
        const int64_t kept[1] = {0};
        const draws one = {d->uniforms + o, d->temperatures + o, d->top_k + o, d->top_p + o, d->min_p + o,
                           d->tokens + o, d->valid + o, d->logprobs + o, d->policy_logprobs + o,
                           d->tops + o * d->num_chunks, d->sums + o * d->num_chunks,
                           d->policy_sums + o * d->num_chunks, d->num_chunks};
        call c;
        memset(&c, 0, sizeof c);
        c.kept = kept, c.draw = &one, c.logits = (float *)rows[o];
        for (long chunk = 0; chunk < d->num_chunks; chunk++)
            note_chunk(&one, 0, chunk, rows[o] + chunk * SPAN, least(SPAN, (long)m->vocab - chunk * SPAN));
        draw_one(m, &c, 0, 0, 0);
    }
}

#else

int decode_step_supported(void) { return 0; }

#endif
