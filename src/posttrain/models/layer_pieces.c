/* What stands between the matrix products of a decoder's layer, forward and backward, in one pass over memory each:
 * RMSNorm with the residual's gradient, norms of query and key heads, the gated unit, the residual sum.
 *
 * native.py compiles this with the machine's own C compiler, with or without -DBF16. Rows are divided among threads in
 * a fixed way, and every sum over rows is taken in a fixed order: results are the same from run to run.
 */
#include "lanes.h"

enum { PARTS = 64 }; /* sums over rows are taken in so many parts, whatever the number of threads */

static inline long part_start(long rows, long part) { return rows * part / PARTS; }

/* out = x / sqrt(mean(x^2) + eps) * weight for rows of D numbers; rstd gets 1 / sqrt(...). */
void rms_norm(const float *x, const float *weight, element *out, float *rstd, long rows, long D, float eps,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long n = 0; n < rows; n++) {
        const float *row = x + n * D;
        element *to = out + n * D;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < D; i++) sum += row[i] * row[i];
        const float scale = 1.0f / sqrtf(sum / (float)D + eps);
        rstd[n] = scale;
        long i = 0;
        for (; i + LANES <= D; i += LANES) store_e(to + i, load(row + i) * scale * load(weight + i));
        for (; i < D; i++) to[i] = narrow(row[i] * scale * weight[i]);
    }
}

/* grad_x = residual gradient (or none) + gradient through the norm; partial[PARTS][D] gets the weight's, in parts. */
void rms_norm_backward(const element *grad, const float *residual, const float *x, const float *weight,
                       const float *rstd, float *grad_x, float *partial, long rows, long D, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long part = 0; part < PARTS; part++) {
        float *mine = partial + part * D;
        memset(mine, 0, (size_t)D * sizeof(float));
        for (long n = part_start(rows, part); n < part_start(rows, part + 1); n++) {
            const float *row = x + n * D, scale = rstd[n];
            const element *g = grad + n * D;
            float *to = grad_x + n * D, pull = 0.0f;
            long i = 0;
            lanes pulls = {};
            for (; i + LANES <= D; i += LANES) {
                const lanes gx = load_e(g + i) * load(row + i);
                store(mine + i, load(mine + i) + gx * scale);
                pulls += gx * load(weight + i);
            }
            pull = sum_of(pulls);
            for (; i < D; i++) {
                const float gx = widen(g[i]) * row[i];
                mine[i] += gx * scale;
                pull += gx * weight[i];
            }
            pull *= -scale * scale * scale / (float)D;
            const float *other = residual ? residual + n * D : 0;
            for (i = 0; i + LANES <= D; i += LANES) {
                const lanes out = load_e(g + i) * load(weight + i) * scale + load(row + i) * pull;
                store(to + i, other ? out + load(other + i) : out);
            }
            for (; i < D; i++)
                to[i] = widen(g[i]) * weight[i] * scale + row[i] * pull + (other ? other[i] : 0.0f);
        }
    }
}

/* RMSNorm of pieces of a row: `count[0]` pieces of `width[0]` numbers with weight[0], then the same with [1]; the rest of
 * the A numbers of a row is copied. rstd has count[0] + count[1] numbers a row. */
void norm_heads(const element *x, const float *weight0, const float *weight1, element *out, float *rstd, long rows,
                long A, long count0, long width0, long count1, long width1, float eps, int threads) {
    const long done = count0 * width0 + count1 * width1, pieces = count0 + count1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long n = 0; n < rows; n++) {
        const element *row = x + n * A;
        element *to = out + n * A;
        for (long p = 0; p < pieces; p++) {
            const long width = p < count0 ? width0 : width1;
            const float *weight = p < count0 ? weight0 : weight1;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < width; i++) sum += widen(row[i]) * widen(row[i]);
            const float scale = 1.0f / sqrtf(sum / (float)width + eps);
            rstd[n * pieces + p] = scale;
            long i = 0;
            for (; i + LANES <= width; i += LANES) store_e(to + i, load_e(row + i) * scale * load(weight + i));
            for (; i < width; i++) to[i] = narrow(widen(row[i]) * scale * weight[i]);
            row += width, to += width;
        }
        memcpy(to, row, (size_t)(A - done) * sizeof(element));
    }
}

/* partial[PARTS][width0 + width1]: gradients of the two weights. */
void norm_heads_backward(const element *grad, const element *x, const float *weight0, const float *weight1,
                         const float *rstd, element *grad_x, float *partial, long rows, long A, long count0,
                         long width0, long count1, long width1, int threads) {
    const long done = count0 * width0 + count1 * width1, pieces = count0 + count1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long part = 0; part < PARTS; part++) {
        float *mine = partial + part * (width0 + width1);
        memset(mine, 0, (size_t)(width0 + width1) * sizeof(float));
        for (long n = part_start(rows, part); n < part_start(rows, part + 1); n++) {
            const element *row = x + n * A, *g = grad + n * A;
            element *to = grad_x + n * A;
            for (long p = 0; p < pieces; p++) {
                const long width = p < count0 ? width0 : width1;
                const float *weight = p < count0 ? weight0 : weight1;
                float *sums = p < count0 ? mine : mine + width0;
                const float scale = rstd[n * pieces + p];
                float pull = 0.0f;
#pragma omp simd reduction(+ : pull)
                for (long i = 0; i < width; i++) {
                    const float gx = widen(g[i]) * widen(row[i]);
                    sums[i] += gx * scale;
                    pull += gx * weight[i];
                }
                pull *= -scale * scale * scale / (float)width;
                for (long i = 0; i < width; i++)
                    to[i] = narrow(widen(g[i]) * weight[i] * scale + widen(row[i]) * pull);
                row += width, g += width, to += width;
            }
            memcpy(to, g, (size_t)(A - done) * sizeof(element));
        }
    }
}

/* sum = x + branch */
void residual_sum(const float *x, const element *branch, float *sum, long num, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long at = 0; at < num; at += 4096) {
        const long end = at + 4096 < num ? at + 4096 : num;
        long i = at;
        for (; i + LANES <= end; i += LANES) store(sum + i, load(x + i) + load_e(branch + i));
        for (; i < end; i++) sum[i] = x[i] + widen(branch[i]);
    }
}

/* out[i] = x[places[i]], rows of D numbers */
void gather_rows(const float *x, const int64_t *places, float *out, long num, long D, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long i = 0; i < num; i++) memcpy(out + i * D, x + places[i] * D, (size_t)D * sizeof(float));
}

/* out[places[i]] += x[i]; a place may come more than once, so threads share columns, not rows */
void add_rows(const float *x, const int64_t *places, float *out, long num, long D, int threads) {
    const long width = (D / threads + LANES) / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long first = 0; first < D; first += width) {
        const long end = first + width < D ? first + width : D;
        for (long i = 0; i < num; i++) {
            const float *from = x + i * D;
            float *to = out + places[i] * D;
            long c = first;
            for (; c + LANES <= end; c += LANES) store(to + c, load(to + c) + load(from + c));
            for (; c < end; c++) to[c] += from[c];
        }
    }
}

/* out = x, rounded */
void round_off(const float *x, element *out, long num, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long at = 0; at < num; at += 4096) {
        const long end = at + 4096 < num ? at + 4096 : num;
        long i = at;
        for (; i + LANES <= end; i += LANES) store_e(out + i, load(x + i));
        for (; i < end; i++) out[i] = narrow(x[i]);
    }
}

static inline lanes sigmoid(lanes x) {
    /* e^-|x| lies between 0 and 1, whatever x */
    const lanes_i positive = x >= (lanes){};
    const lanes e = exp_of(choose(positive, -x, x)), share = 1.0f / (1.0f + e);
    return choose(positive, share, e * share);
}

static inline lanes load_some(const element *from, long num) {
    element buffer[LANES] = {0};
    memcpy(buffer, from, (size_t)num * sizeof(element));
    return load_e(buffer);
}

static inline void store_some(element *to, lanes x, long num) {
    element buffer[LANES];
    store_e(buffer, x);
    memcpy(to, buffer, (size_t)num * sizeof(element));
}

/* out = silu(gate) * value, where a row of x is M gates, then M values */
void silu_gate(const element *x, element *out, long rows, long M, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long n = 0; n < rows; n++) {
        const element *gate = x + n * 2 * M, *value = gate + M;
        element *to = out + n * M;
        long i = 0;
        for (; i + LANES <= M; i += LANES) {
            const lanes g = load_e(gate + i);
            store_e(to + i, g * sigmoid(g) * load_e(value + i));
        }
        if (i < M) {
            const lanes g = load_some(gate + i, M - i);
            store_some(to + i, g * sigmoid(g) * load_some(value + i, M - i), M - i);
        }
    }
}

static inline void gate_gradients(lanes grad, lanes g, lanes v, lanes *to_gate, lanes *to_value) {
    const lanes s = sigmoid(g), silu = g * s;
    *to_value = grad * silu;
    *to_gate = grad * v * (s + silu * (1.0f - s));
}

void silu_gate_backward(const element *grad, const element *x, element *grad_x, long rows, long M, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long n = 0; n < rows; n++) {
        const element *gate = x + n * 2 * M, *value = gate + M, *from = grad + n * M;
        element *to_gate = grad_x + n * 2 * M, *to_value = to_gate + M;
        lanes a, b;
        long i = 0;
        for (; i + LANES <= M; i += LANES) {
            gate_gradients(load_e(from + i), load_e(gate + i), load_e(value + i), &a, &b);
            store_e(to_gate + i, a);
            store_e(to_value + i, b);
        }
        if (i < M) {
            const long num = M - i;
            gate_gradients(load_some(from + i, num), load_some(gate + i, num), load_some(value + i, num), &a, &b);
            store_some(to_gate + i, a, num);
            store_some(to_value + i, b, num);
        }
    }
}
