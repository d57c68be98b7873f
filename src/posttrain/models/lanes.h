/* Sixteen numbers at a time, in the vector types that GCC and Clang share: a processor of narrower vectors gets several
 * instructions for one. `element` is what matrix products read and write: bf16 with -DBF16, else float. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16 };
typedef float lanes __attribute__((vector_size(64)));
typedef int32_t lanes_i __attribute__((vector_size(64)));
typedef uint32_t lanes_u __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

static inline lanes load(const float *from) {
    lanes out;
    memcpy(&out, from, sizeof out);
    return out;
}

static inline void store(float *to, lanes x) { memcpy(to, &x, sizeof x); }

static inline lanes all(float x) { return x - (lanes){}; }

static inline lanes choose(lanes_i where, lanes yes, lanes no) {
    return (lanes)(((lanes_i)yes & where) | ((lanes_i)no & ~where));
}

#ifdef BF16
typedef uint16_t element;

static inline float widen(element x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

static inline element narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;          /* NaN */
    return (element)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16); /* to nearest, ties to even */
}

static inline lanes load_e(const element *from) {
    halves half;
    memcpy(&half, from, sizeof half);
    return (lanes)(__builtin_convertvector(half, lanes_u) << 16);
}

static inline void store_e(element *to, lanes x) {
#ifdef __AVX512BF16__
    __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &half, sizeof half);
#else
    lanes_u bits = (lanes_u)x;
    lanes_u rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    lanes_i nan = (lanes_i)((bits & 0x7fffffffu) > 0x7f800000u);
    rounded = (rounded & (lanes_u)~nan) | (0x7fc0u & (lanes_u)nan);
    halves half = __builtin_convertvector(rounded, halves);
    memcpy(to, &half, sizeof half);
#endif
}
#else
typedef float element;
static inline float widen(element x) { return x; }
static inline element narrow(float x) { return x; }
static inline lanes load_e(const element *from) { return load(from); }
static inline void store_e(element *to, lanes x) { store(to, x); }
#endif

static inline lanes rolled(lanes x, int by) {
    const lanes_i order = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#ifdef __clang__
    lanes out;
    for (int i = 0; i < LANES; i++) out[i] = x[(i + by) % LANES];
    return out;
#else
    return __builtin_shuffle(x, (order + by) & (LANES - 1));
#endif
}

static inline float sum_of(lanes x) {
    x += rolled(x, 8), x += rolled(x, 4), x += rolled(x, 2), x += rolled(x, 1);
    return x[0];
}

static inline float most_of(lanes x) {
    lanes y = rolled(x, 8);
    x = choose(y > x, y, x), y = rolled(x, 4);
    x = choose(y > x, y, x), y = rolled(x, 2);
    x = choose(y > x, y, x), y = rolled(x, 1);
    return choose(y > x, y, x)[0];
}

static inline lanes counting(float from) {
    return from + (lanes){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

#ifdef __AVX512F__
/* exp(x) to 2^-22 for x <= 88: 2^n times the series of 2^r; 0 far below 0, NaN stays NaN. */
static inline lanes exp_of(lanes x) {
    const __m512 turns = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x), _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(turns, 0), r = _mm512_sub_ps(turns, n);
    __m512 sum = _mm512_set1_ps(1.535336188e-4f);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.339887440e-3f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(9.618437357e-3f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(5.550332471e-2f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(2.402264791e-1f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(6.931472029e-1f));
    return (lanes)_mm512_scalef_ps(_mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f)), n);
}
#else
/* exp(x), to a few units in the last place, for x <= 88; 0 below -87; NaN stays NaN. 2^n from exponent bits, e^r by its
 * series. */
static inline lanes exp_of(lanes x) {
    const lanes_i lost = x < all(-87.0f);
    x = choose(lost, all(-87.0f), x);
    lanes shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum has no bits left for a fraction */
    lanes n = shifted - 12582912.0f;
    lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* minus n ln 2, in two parts */
    lanes tail = 0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)));
    lanes series = 1.0f + r * (1.0f + r * tail);
    lanes power = (lanes)(((lanes_u)shifted + 127u) << 23);
    return (lanes)((lanes_i)(series * power) & ~lost);
}
#endif
