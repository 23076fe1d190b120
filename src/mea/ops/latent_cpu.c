/* Attention of a few queries over a long bf16 cache, for processors with AVX-512 bf16 products.
 *
 * For every head of a cache: out = softmax(scale * Q K^T) V, Q [n, rk], K [t, rk], V [t, rv], all bf16 with fp32 sums.
 * Decoding reads every cached number once and multiplies it with each of the n queries, so what counts is to touch
 * memory once, in order, on all cores, and to keep up with it. The tokens are cut into parts for the cores; each part
 * is done in blocks of BLOCK tokens with the running maximum of a streaming softmax (arXiv 2205.14135), and the parts are
 * joined at the end: with m_p and l_p a part's maximum and sum of exponentials, out = sum_p e^(m_p-m) O_p / sum_p e^(m_p-m) l_p.
 *
 * One head and part:
 *   scores   4 queries x 4 tokens at a time: 16 accumulators of dot products along the width, summed across at the end;
 *   softmax  16 tokens at a time in fp32; the weights are rounded to bf16, as PyTorch's own kernel does;
 *   output   a bf16 product sums over pairs of tokens, so that a block of V is first laid out in such pairs; then
 *            4 queries x up to 64 channels at a time.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BLOCK 64            /* tokens: a block of K or V of width 256 takes 32 KiB */
#define PAIRS (BLOCK / 2)
#define NONE -1e30f         /* the score of a token that is not there */

typedef uint16_t bf16;

static long round_up(long n, long step) { return (n + step - 1) / step * step; }

/* The first of 16 lanes, as many as are left. */
static inline __mmask16 lanes(long left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

static inline __m512bh load_bf16(const bf16 *from, __mmask32 mask) {
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
}

/* e^x for x <= 0: 2^n times a polynomial of the rest, with a relative error of 2e-7. */
static inline __m512 exponential(__m512 x) {
    __m512 y = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _mm512_set1_ps(-150.0f));
    __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(y, n), p = _mm512_set1_ps(1.5403530e-4f);
    static const float terms[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(p, n);
}

/* The sums of 16 vectors, in their order. */
static inline __m512 sums(__m512 a[16]) {
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        a[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; i++)
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
}

/* scores[n4][BLOCK] of `count` tokens; queries are padded to a multiple of 4 and to whole vectors. */
static void score(const bf16 *queries, long n4, const bf16 *keys, long stride, long count, long rk, float scale,
                  float *scores) {
    const long width = round_up(rk, 32), whole = rk / 32 * 32;
    const __mmask32 tail = (__mmask32)((1ull << (rk - whole)) - 1);
    for (long t = 0; t < count; t += 4) {
        const bf16 *row[4];
        for (int j = 0; j < 4; j++) row[j] = keys + (t + j < count ? t + j : count - 1) * stride;
        for (long i = 0; i < n4; i += 4) {
            const bf16 *query = queries + i * width;
            __m512 sum[16];
#pragma GCC unroll 16
            for (int s = 0; s < 16; s++) sum[s] = _mm512_setzero_ps();
            for (long c = 0; c < width; c += 32) {
                const __mmask32 mask = c < whole ? ~(__mmask32)0 : tail;
                __m512bh k[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) k[j] = load_bf16(row[j] + c, mask);
#pragma GCC unroll 4
                for (int a = 0; a < 4; a++) {
                    __m512bh q = (__m512bh)_mm512_loadu_si512(query + a * width + c);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) sum[4 * a + j] = _mm512_dpbf16_ps(sum[4 * a + j], q, k[j]);
                }
            }
            __m512 all = _mm512_mul_ps(sums(sum), _mm512_set1_ps(scale));
            float *to = scores + i * BLOCK + t;
            _mm_storeu_ps(to, _mm512_extractf32x4_ps(all, 0));
            _mm_storeu_ps(to + BLOCK, _mm512_extractf32x4_ps(all, 1));
            _mm_storeu_ps(to + 2 * BLOCK, _mm512_extractf32x4_ps(all, 2));
            _mm_storeu_ps(to + 3 * BLOCK, _mm512_extractf32x4_ps(all, 3));
        }
    }
    for (long i = 0; i < n4; i++)
        for (long t = count; t < BLOCK; t++) scores[i * BLOCK + t] = NONE;
}

/* Scores of one query to bf16 weights; returns what the sums so far have to be multiplied with. */
static inline float weigh(const float *scores, bf16 *weights, float *highest, float *sum) {
    __m512 s[BLOCK / 16], top = _mm512_set1_ps(*highest);
    for (int i = 0; i < BLOCK / 16; i++) top = _mm512_max_ps(top, s[i] = _mm512_loadu_ps(scores + 16 * i));
    const float now = _mm512_reduce_max_ps(top);
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < BLOCK / 16; i++) {
        __m512 p = exponential(_mm512_sub_ps(s[i], _mm512_set1_ps(now)));
        total = _mm512_add_ps(total, p);
        _mm256_storeu_si256((__m256i *)(weights + 16 * i), (__m256i)_mm512_cvtneps_pbh(p));
    }
    const float before = now > *highest ? expf(*highest - now) : 1;
    *highest = now;
    *sum = *sum * before + _mm512_reduce_add_ps(total);
    return before;
}

/* pairs[PAIRS][rv16]: tokens 2p and 2p+1 of each channel side by side. */
static void interleave(const bf16 *values, long stride, long count, long rv, uint32_t *pairs) {
    const long width = round_up(rv, 16);
    for (long p = 0; p < PAIRS; p++) {
        const bf16 *even = values + 2 * p * stride, *odd = even + stride;
        const int has_even = 2 * p < count, has_odd = 2 * p + 1 < count;
        for (long c = 0; c < width; c += 16) {
            const __mmask16 mask = lanes(rv - c);
            __m256i a = _mm256_maskz_loadu_epi16(has_even ? mask : 0, even + c);
            __m256i b = _mm256_maskz_loadu_epi16(has_odd ? mask : 0, odd + c);
            __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
            _mm512_storeu_si512(pairs + p * width + c, both);
        }
    }
}

/* 4 queries x `vectors` x 16 channels of the output: out = before * out + weights * values. */
static inline __attribute__((always_inline)) void gather(const int vectors, const uint32_t *weights,
                                                         const uint32_t *pairs, long width, const float *before,
                                                         float *out) {
    __m512 sum[4][4];
#pragma GCC unroll 4
    for (int a = 0; a < 4; a++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[a][v] = _mm512_mul_ps(_mm512_loadu_ps(out + a * width + 16 * v), _mm512_set1_ps(before[a]));
    for (long p = 0; p < PAIRS; p++) {
        __m512bh value[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) value[v] = (__m512bh)_mm512_loadu_si512(pairs + p * width + 16 * v);
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) {
            __m512bh weight = (__m512bh)_mm512_set1_epi32((int)weights[a * PAIRS + p]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[a][v] = _mm512_dpbf16_ps(sum[a][v], weight, value[v]);
        }
    }
#pragma GCC unroll 4
    for (int a = 0; a < 4; a++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(out + a * width + 16 * v, sum[a][v]);
}

/* The tokens [0, t) of one head: unnormalised out[n4][rv16], and each query's maximum and sum of exponentials. */
static void attend_part(const bf16 *queries, long n4, const bf16 *keys, long key_stride, const bf16 *values,
                        long value_stride, long t, long rk, long rv, float scale, char *scratch, float *out,
                        float *highest, float *sum) {
    const long width = round_up(rv, 16);
    uint32_t *pairs = (uint32_t *)scratch;
    float *scores = (float *)(pairs + PAIRS * width), *before = scores + n4 * BLOCK;
    bf16 *weights = (bf16 *)(before + n4);
    memset(out, 0, n4 * width * sizeof *out);
    for (long i = 0; i < n4; i++) highest[i] = NONE, sum[i] = 0;
    for (long start = 0; start < t; start += BLOCK) {
        const long count = t - start < BLOCK ? t - start : BLOCK;
        score(queries, n4, keys + start * key_stride, key_stride, count, rk, scale, scores);
        for (long i = 0; i < n4; i++)
            before[i] = weigh(scores + i * BLOCK, weights + i * BLOCK, highest + i, sum + i);
        interleave(values + start * value_stride, value_stride, count, rv, pairs);
        for (long c = 0; c < width; c += 64)
            for (long i = 0; i < n4; i += 4) {
                const uint32_t *w = (const uint32_t *)(weights + i * BLOCK);
                float *to = out + i * width + c;
                switch (width - c >= 64 ? 4 : (width - c) / 16) {
                case 4: gather(4, w, pairs + c, width, before + i, to); break;
                case 3: gather(3, w, pairs + c, width, before + i, to); break;
                case 2: gather(2, w, pairs + c, width, before + i, to); break;
                default: gather(1, w, pairs + c, width, before + i, to);
                }
            }
    }
}

/* Strides count elements; queries [heads, n, rk] and out [heads, n, rv] are contiguous. `heads` counts the heads of all
 * sequences: head i of sequence s starts at s * sequence_stride + i * head_stride. Returns 0, or 1 if memory is short. */
int mea_attend_latents(const bf16 *queries, const bf16 *keys, const bf16 *values, bf16 *out, const long *sizes,
                       const long *key_strides, const long *value_strides, float scale, int threads) {
    const long b = sizes[0], g = sizes[1], n = sizes[2], t = sizes[3], rk = sizes[4], rv = sizes[5];
    const long n4 = round_up(n, 4), qwidth = round_up(rk, 32), width = round_up(rv, 16), heads = b * g;
    long parts = (threads + heads - 1) / heads, most = (t + 4 * BLOCK - 1) / (4 * BLOCK);
    parts = parts < most ? parts : most;
    const long size = round_up((t + parts - 1) / parts, BLOCK);
    parts = (t + size - 1) / size;
    const long of_part = n4 * (width + 2), of_queries = n4 * qwidth;
    const size_t of_thread = PAIRS * width * 4 + n4 * (BLOCK * 6 + 4) + 64;
    float *partial = aligned_alloc(64, round_up(heads * parts * of_part * sizeof(float), 64));
    bf16 *padded = aligned_alloc(64, round_up(heads * of_queries * sizeof(bf16), 64));
    char *scratch = aligned_alloc(64, round_up(of_thread, 64) * threads);
    if (!partial || !padded || !scratch) {
        free(partial), free(padded), free(scratch);
        return 1;
    }
    memset(padded, 0, heads * of_queries * sizeof(bf16));
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < n; i++)
            memcpy(padded + h * of_queries + i * qwidth, queries + (h * n + i) * rk, rk * sizeof(bf16));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long thread = 0; thread < threads; thread++)
        for (long task = thread; task < heads * parts; task += threads) {
            const long h = task / parts, from = task % parts * size, to = from + size < t ? from + size : t;
            float *mine = partial + task * of_part;
            attend_part(padded + h * of_queries, n4,
                        keys + h / g * key_strides[0] + h % g * key_strides[1] + from * key_strides[2], key_strides[2],
                        values + h / g * value_strides[0] + h % g * value_strides[1] + from * value_strides[2],
                        value_strides[2], to - from, rk, rv, scale, scratch + thread * round_up(of_thread, 64), mine,
                        mine + n4 * width, mine + n4 * (width + 1));
        }
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < n; i++) {
            float top = NONE, total = 0;
            const float *part = partial + h * parts * of_part, *extra = part + n4 * width + i;
            for (long p = 0; p < parts; p++) top = fmaxf(top, extra[p * of_part]);
            for (long p = 0; p < parts; p++) total += expf(extra[p * of_part] - top) * extra[p * of_part + n4];
            for (long c = 0; c < rv; c += 16) {
                __m512 x = _mm512_setzero_ps();
                for (long p = 0; p < parts; p++)
                    x = _mm512_fmadd_ps(_mm512_set1_ps(expf(extra[p * of_part] - top) / total),
                                        _mm512_loadu_ps(part + p * of_part + i * width + c), x);
                _mm256_mask_storeu_epi16(out + (h * n + i) * rv + c,
                                         lanes(rv - c),
                                         (__m256i)_mm512_cvtneps_pbh(x));
            }
        }
    free(partial), free(padded), free(scratch);
    return 0;
}

static inline __m512 load_floats(const bf16 *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

/* Products of queries with keys that are rotated on the way: channels c and c + d / 2 are a pair, turned by the angle whose
 * cosine and sine are given; all in fp32. queries [b, g, n, d] and scores [b, g, n, t] are contiguous; keys are given by
 * their strides of sequence, head and token, cosines and sines (of which the first d / 2 of a token are read) by those of
 * sequence and token. */
void mea_turned_scores(const bf16 *queries, const bf16 *keys, const bf16 *cosines, const bf16 *sines, float *scores,
                       const long *sizes, const long *key_strides, const long *turn_strides, int threads) {
    const long b = sizes[0], g = sizes[1], n = sizes[2], t = sizes[3], d = sizes[4], half = d / 2;
    const long rows = (t + 15) / 16; /* 16 tokens make a vector of scores */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long task = 0; task < b * g * rows; task++) {
        const long head = task / rows, start = task % rows * 16, count = t - start < 16 ? t - start : 16;
        const bf16 *key = keys + head / g * key_strides[0] + head % g * key_strides[1] + start * key_strides[2];
        const long turn = head / g * turn_strides[0] + start * turn_strides[1];
        for (long i = 0; i < n; i += 4) {
            const long some = n - i < 4 ? n - i : 4;
            const bf16 *query = queries + (head * n + i) * d;
            __m512 sum[4][16];
            for (int a = 0; a < 4; a++)
                for (int u = 0; u < 16; u++) sum[a][u] = _mm512_setzero_ps();
            for (long c = 0; c < half; c += 16) {
                const __mmask16 mask = lanes(half - c);
                __m512 q1[4], q2[4];
                for (int a = 0; a < 4; a++) {
                    const bf16 *from = query + (a < some ? a : 0) * d + c;
                    q1[a] = load_floats(from, mask), q2[a] = load_floats(from + half, mask);
                }
                for (long u = 0; u < count; u++) {
                    const bf16 *from = key + u * key_strides[2] + c;
                    const __m512 k1 = load_floats(from, mask), k2 = load_floats(from + half, mask);
                    const __m512 cosine = load_floats(cosines + turn + u * turn_strides[1] + c, mask);
                    const __m512 sine = load_floats(sines + turn + u * turn_strides[1] + c, mask);
                    const __m512 r1 = _mm512_fnmadd_ps(k2, sine, _mm512_mul_ps(k1, cosine));
                    const __m512 r2 = _mm512_fmadd_ps(k1, sine, _mm512_mul_ps(k2, cosine));
#pragma GCC unroll 4
                    for (int a = 0; a < 4; a++)
                        sum[a][u] = _mm512_fmadd_ps(q2[a], r2, _mm512_fmadd_ps(q1[a], r1, sum[a][u]));
                }
            }
            for (long a = 0; a < some; a++)
                _mm512_mask_storeu_ps(scores + (head * n + i + a) * t + start, (__mmask16)((1u << count) - 1),
                                      sums(sum[a]));
        }
    }
}

/* 16 codes of so many bits, the first in the lowest bits of the first byte, as fp32; `rest` of them are there. */
static inline __m512 codes16(const uint8_t *from, long bits, long rest) {
    const long bytes = rest >= 16 ? 2 * bits : (rest * bits + 7) / 8;
    __m128i x = _mm_maskz_loadu_epi8((__mmask16)((1u << bytes) - 1), from);
    if (bits == 4) { /* a byte to two: its low half, then its high half */
        x = _mm_cvtepu8_epi16(x);
        x = _mm_and_si128(_mm_or_si128(x, _mm_slli_epi16(x, 4)), _mm_set1_epi8(15));
    } else if (bits == 2) {
        x = _mm_cvtepu8_epi32(x);
        x = _mm_or_si128(x, _mm_slli_epi32(x, 12));
        x = _mm_and_si128(_mm_or_si128(x, _mm_slli_epi32(x, 6)), _mm_set1_epi8(3));
    }
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x));
}

/* low + code * step of blocks of tokens, to bf16. codes [b, g, n, block, bytes] are contiguous. `step` and `low` hold a
 * number for each channel of a block, or, if `group` is not 0, for each `group` channels (a multiple of 16) of a token.
 * Strides of out are those of sequence, head and token. */
void mea_decode(const uint8_t *codes, const bf16 *step, const bf16 *low, bf16 *out, const long *sizes,
                const long *strides, int threads) {
    const long b = sizes[0], g = sizes[1], n = sizes[2], block = sizes[3], width = sizes[4], bits = sizes[5];
    const long group = sizes[6], bytes = (width * bits + 7) / 8;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long task = 0; task < b * g * n; task++) {
        const long head = task / n;
        const uint8_t *from = codes + task * block * bytes;
        bf16 *to = out + head / g * strides[0] + head % g * strides[1] + task % n * block * strides[2];
        for (long c = 0; c < width; c += 16) {
            const long rest = width - c;
            const __mmask16 mask = rest >= 16 ? 0xffff : (__mmask16)((1u << rest) - 1);
            __m512 s = _mm512_setzero_ps(), l = s;
            if (!group) {
                s = load_floats(step + task * width + c, mask);
                l = load_floats(low + task * width + c, mask);
            }
            for (long t = 0; t < block; t++) {
                if (group) {
                    const long place = (task * block + t) * (width / group) + c / group;
                    s = _mm512_castsi512_ps(_mm512_set1_epi32((int)((uint32_t)step[place] << 16)));
                    l = _mm512_castsi512_ps(_mm512_set1_epi32((int)((uint32_t)low[place] << 16)));
                }
                const __m512 x = _mm512_fmadd_ps(codes16(from + t * bytes + c * bits / 8, bits, rest), s, l);
                _mm256_mask_storeu_epi16(to + t * strides[2] + c, mask, (__m256i)_mm512_cvtneps_pbh(x));
            }
        }
    }
}

/* A new token's reading of a cache of codes in groups: what is written once per call, and one part of the tokens.
 *
 * A token's components stand in groups, each with codes of 8, 4 or 2 bits and a number pair (low, step): low + step * code.
 * Nothing is decoded for the averages: sum_s w_s (low_s + step_s * code_s) needs the sum of w * low once per group, and the
 * sum of (w * step) * code as a product of bytes. The products of bytes (vpdpbusd: four of them to a lane, twice a cycle)
 * are eight times as many as bf16 products, so that a factor of 15 bits, in two bytes, is the faster and closer one.
 * Blocks of BLOCK tokens are laid out twice, a little at a time, both straight from the packed bytes:
 *   words   [4][BLOCK]: lanes are tokens, each with four bytes of its own. For scores: no sums across lanes.
 *   units   [vectors][BLOCK / 4][16][4]: lanes are 16 components, each with the codes of four tokens. For averages. A vector
 *           takes the same bits of 16 bytes; the order of components is put right once, at the end.
 * With matrix tiles (AMX) the products are done by those: scores and rebuilt keys from components, queries
 * and the decoder in bf16; averages from the same bytes and units.
 * The angle of a token is its block's plus its place's: the block's turns the queries, so that the places' angles, the same
 * for each block, are all that the tokens are turned by. */

#define UNITS (BLOCK / 4)
#define LANES (BLOCK / 16)  /* vectors of one number per token */
#define LARGEST 128         /* components of a group */
#define AT_ONCE 6           /* queries: with LANES or 4 vectors each, 24 of 32 registers are sums */
#define FINE 16256          /* 127 * 128: a factor in two bytes, 128 * high + low */
#define COARSE 4            /* rebuilding: codes of so few bits get factors of one byte: see `lay_decoder` */
#define TINY 1e-33f         /* smaller largest factors are none */

struct group {
    long bits, size, first, byte, bytes, vector, vectors; /* first component, byte and vector of units; their numbers */
};

struct reading {
    long h, g, d, r, rk, half, n, columns, pairs, groups, vectors, bytes, rows, d4;
    struct group *group;
    long code_stride, scale_stride; /* of a token */
    int32_t *turns;                 /* [pairs][3]: two columns of the query, and their frequency */
    float *places;                  /* [half][cosine, sine][BLOCK] */
    int8_t *decoder;                /* [g] then for each group [high, low][d4][size] */
    float *factors;                 /* [g][groups][scale, rest, sum][d4] */
    float *mean;                    /* [g][d4] */
    /* With matrix tiles (AMX): */
    long tiles, query_rows, padded_h, padded_pairs; /* rows of a tile of queries; multiples of it, and of 16 pairs */
    long padded_half;                               /* frequencies, up to a multiple of 16 */
    const float *planes;                            /* [h][re, im][padded_pairs + padded_half] of the queries */
    uint32_t *place_pairs;                          /* [near, rest][LANES][padded_half][16]: the places' angles in bf16 */
    const bf16 *whole;                              /* [g][rows][2 padded_pairs]: the keys' decoder as it is */
    long whole_rows;                                /* a multiple of 16 */
};

/* sum += products of four bytes of each lane, unsigned times signed. Written out, since gcc 12 copies the sums of the
 * intrinsic from register to register, which takes longer than the products. */
static inline __attribute__((always_inline)) void add_bytes(__m512i *sum, __m512i codes, __m512i factors) {
    __m512i x = *sum;
    __asm__("vpdpbusd %2, %1, %0" : "+v"(x) : "v"(codes), "v"(factors));
    *sum = x;
}

/* 16 bytes, or so many words, of each of four tokens. */
static inline __attribute__((always_inline)) __m512i four(const uint8_t *from, const long *row, const int whole,
                                                          __mmask8 mask) {
    __m128i x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        x[i] = whole ? _mm_loadu_si128((const __m128i *)(from + row[4 * i]))
                     : _mm_maskz_loadu_epi32(mask, from + row[4 * i]);
    __m512i y = _mm512_inserti32x4(_mm512_castsi128_si512(x[0]), x[1], 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(y, x[2], 2), x[3], 3);
}

/* words[live][BLOCK]: so many words of each token; row[BLOCK] are the tokens' places in bytes. */
static inline __attribute__((always_inline)) void lay_words(const uint8_t *from, const long *row, const int whole,
                                                            long live, uint32_t *words) {
    for (int v = 0; v < LANES; v++) {
        __m512i z[4], a[4], b[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) z[i] = four(from, row + 16 * v + i, whole, (__mmask8)((1u << live) - 1));
        a[0] = _mm512_unpacklo_epi32(z[0], z[1]), a[1] = _mm512_unpackhi_epi32(z[0], z[1]);
        a[2] = _mm512_unpacklo_epi32(z[2], z[3]), a[3] = _mm512_unpackhi_epi32(z[2], z[3]);
        b[0] = _mm512_unpacklo_epi64(a[0], a[2]), b[1] = _mm512_unpackhi_epi64(a[0], a[2]);
        b[2] = _mm512_unpacklo_epi64(a[1], a[3]), b[3] = _mm512_unpackhi_epi64(a[1], a[3]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            if (whole || j < live) _mm512_storeu_si512(words + j * BLOCK + 16 * v, b[j]);
    }
}

/* units[8 / bits][UNITS][64]: 16 bytes, or so many words, of each token. */
static inline __attribute__((always_inline)) void lay_units(const uint8_t *from, const long *row, const int bits,
                                                            const int whole, long live, uint8_t *units) {
    for (int v = 0; v < LANES; v++) {
        __m512i z[4], a[4], b[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) z[i] = four(from, row + 16 * v + i, whole, (__mmask8)((1u << live) - 1));
        a[0] = _mm512_unpacklo_epi8(z[0], z[1]), a[1] = _mm512_unpackhi_epi8(z[0], z[1]);
        a[2] = _mm512_unpacklo_epi8(z[2], z[3]), a[3] = _mm512_unpackhi_epi8(z[2], z[3]);
        b[0] = _mm512_unpacklo_epi16(a[0], a[2]), b[1] = _mm512_unpackhi_epi16(a[0], a[2]);
        b[2] = _mm512_unpacklo_epi16(a[1], a[3]), b[3] = _mm512_unpackhi_epi16(a[1], a[3]);
        a[0] = _mm512_shuffle_i32x4(b[0], b[1], 0x44), a[1] = _mm512_shuffle_i32x4(b[2], b[3], 0x44);
        a[2] = _mm512_shuffle_i32x4(b[0], b[1], 0xee), a[3] = _mm512_shuffle_i32x4(b[2], b[3], 0xee);
        z[0] = _mm512_shuffle_i32x4(a[0], a[1], 0x88), z[1] = _mm512_shuffle_i32x4(a[0], a[1], 0xdd);
        z[2] = _mm512_shuffle_i32x4(a[2], a[3], 0x88), z[3] = _mm512_shuffle_i32x4(a[2], a[3], 0xdd);
        /* Unit 4 v + i goes to the place 4 i + v, where `in_bytes` puts its weights. */
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
            for (int k = 0; k < 8 / bits; k++)
                _mm512_storeu_si512(units + (k * UNITS + 4 * i + v) * 64,
                                    _mm512_and_si512(_mm512_srli_epi16(z[i], k * bits),
                                                     _mm512_set1_epi8((char)((1 << bits) - 1))));
    }
}

/* How many words of a group there are from word j, at most 4. */
static long words_from(const struct group *group, long j) {
    return group->bytes / 4 - j < 4 ? group->bytes / 4 - j : 4;
}

static void words_of(const uint8_t *from, const long *row, const struct group *group, long j, uint32_t *words) {
    const long live = words_from(group, j);
    if (live == 4) lay_words(from + group->byte + 4 * j, row, 1, 4, words);
    else lay_words(from + group->byte + 4 * j, row, 0, live, words);
}

static void units_of(const uint8_t *from, const long *row, const struct group *group, uint8_t *units) {
    for (long j = 0; j < group->bytes / 4; j += 4, units += 8 / group->bits * UNITS * 64) {
        const uint8_t *here = from + group->byte + 4 * j;
        const long live = words_from(group, j);
        switch (group->bits * 2 + (live == 4)) {
        case 17: lay_units(here, row, 8, 1, live, units); break;
        case 16: lay_units(here, row, 8, 0, live, units); break;
        case 9: lay_units(here, row, 4, 1, live, units); break;
        case 8: lay_units(here, row, 4, 0, live, units); break;
        case 5: lay_units(here, row, 2, 1, live, units); break;
        default: lay_units(here, row, 2, 0, live, units);
        }
    }
}

/* 0, step, 2 step, ... */
static inline __m512i multiples(long step) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)step));
}

/* low[groups][BLOCK] and step[groups][BLOCK], 0 where a token is not visible, and the widest step of each group. */
static void lay_scales(const bf16 *scales, long stride, long groups, uint64_t visible, float *low, float *step,
                       float *widest) {
    const __m512i index = multiples(stride);
    for (long i = 0; i < groups; i++) {
        __m512 most = _mm512_setzero_ps();
        for (int v = 0; v < LANES; v++) {
            __m512i x = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), (__mmask16)(visible >> 16 * v), index,
                                                    scales + 16 * v * stride + 2 * i, 2);
            const __m512 wide = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
            _mm512_storeu_si512(low + i * BLOCK + 16 * v, _mm512_slli_epi32(x, 16));
            _mm512_storeu_ps(step + i * BLOCK + 16 * v, wide);
            most = _mm512_max_ps(most, _mm512_abs_ps(wide));
        }
        widest[i] = _mm512_reduce_max_ps(most);
    }
}

/* Code k of each word as fp32. A table of 16 numbers looks at the lowest 4 bits alone. */
static inline __attribute__((always_inline)) __m512 code_of(__m512i words, const int bits, const int k) {
    const __m512i x = _mm512_srli_epi32(words, k * bits);
    if (bits == 8) return _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(255)));
    return _mm512_permutexvar_ps(x, bits == 4 ? _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
                                              : _mm512_set_ps(3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0));
}

/* tile[32 / bits * count][BLOCK]: the pairs of so many words, turned by the angles of the places in a block. */
static inline __attribute__((always_inline)) void turn_words(const uint32_t *words, long count, const int bits,
                                                             const float *low, const float *step, const int32_t *turns,
                                                             const float *places, float *tile) {
    for (long j = 0; j < count; j++, words += BLOCK, turns += 3 * (16 / bits), tile += 32 / bits * BLOCK)
        for (int v = 0; v < BLOCK; v += 16) {
            const __m512i x = _mm512_loadu_si512(words + v);
            const __m512 l = _mm512_loadu_ps(low + v), s = _mm512_loadu_ps(step + v);
#pragma GCC unroll 8
            for (int m = 0; m < 16 / bits; m++) {
                const float *turn = places + 2 * BLOCK * turns[3 * m + 2] + v;
                const __m512 cosine = _mm512_loadu_ps(turn), sine = _mm512_loadu_ps(turn + BLOCK);
                const __m512 re = _mm512_fmadd_ps(code_of(x, bits, 2 * m), s, l);
                const __m512 im = _mm512_fmadd_ps(code_of(x, bits, 2 * m + 1), s, l);
                _mm512_storeu_ps(tile + 2 * m * BLOCK + v, _mm512_fnmadd_ps(im, sine, _mm512_mul_ps(re, cosine)));
                _mm512_storeu_ps(tile + (2 * m + 1) * BLOCK + v, _mm512_fmadd_ps(re, sine, _mm512_mul_ps(im, cosine)));
            }
        }
}

/* scores[count][BLOCK] += queries[rows][stride] tile[rows][BLOCK], for a few queries. */
static inline __attribute__((always_inline)) void multiply_few(const int count, const float *queries, long stride,
                                                               const float *tile, long rows, float *scores) {
    __m512 sum[AT_ONCE][LANES];
#pragma GCC unroll 6
    for (int a = 0; a < count; a++)
#pragma GCC unroll 4
        for (int v = 0; v < LANES; v++) sum[a][v] = _mm512_loadu_ps(scores + a * BLOCK + 16 * v);
    for (long c = 0; c < rows; c++) {
        __m512 x[LANES];
#pragma GCC unroll 4
        for (int v = 0; v < LANES; v++) x[v] = _mm512_loadu_ps(tile + c * BLOCK + 16 * v);
#pragma GCC unroll 6
        for (int a = 0; a < count; a++) {
            const __m512 q = _mm512_set1_ps(queries[c * stride + a]);
#pragma GCC unroll 4
            for (int v = 0; v < LANES; v++) sum[a][v] = _mm512_fmadd_ps(q, x[v], sum[a][v]);
        }
    }
#pragma GCC unroll 6
    for (int a = 0; a < count; a++)
#pragma GCC unroll 4
        for (int v = 0; v < LANES; v++) _mm512_storeu_ps(scores + a * BLOCK + 16 * v, sum[a][v]);
}

/* How many of `count` queries to take at once, so that all turns are about as large. */
static long share(long count) {
    const long turns = (count + AT_ONCE - 1) / AT_ONCE;
    return (count + turns - 1) / turns;
}

static void multiply(long count, const float *queries, long stride, const float *tile, long rows, float *scores) {
    const long most = share(count);
    for (long i = 0; i < count; i += most, queries += most, scores += most * BLOCK)
        switch (count - i < most ? count - i : most) {
        case 6: multiply_few(6, queries, stride, tile, rows, scores); break;
        case 5: multiply_few(5, queries, stride, tile, rows, scores); break;
        case 4: multiply_few(4, queries, stride, tile, rows, scores); break;
        case 3: multiply_few(3, queries, stride, tile, rows, scores); break;
        case 2: multiply_few(2, queries, stride, tile, rows, scores); break;
        default: multiply_few(1, queries, stride, tile, rows, scores);
        }
}

/* Scores of one query to weights in fp32, in their place, and the largest of them; returns what the sums so far have to be
 * multiplied with. */
static inline float weigh_visible(float *scores, uint64_t visible, float *highest, float *sum, float *largest) {
    __m512 s[LANES], top = _mm512_set1_ps(NONE), total = _mm512_setzero_ps();
    for (int v = 0; v < LANES; v++) {
        s[v] = _mm512_loadu_ps(scores + 16 * v);
        top = _mm512_mask_max_ps(top, (__mmask16)(visible >> 16 * v), top, s[v]);
    }
    const float here = _mm512_reduce_max_ps(top), now = here > *highest ? here : *highest;
    *largest = expf(here - now);
    for (int v = 0; v < LANES; v++) {
        const __m512 p = exponential(_mm512_sub_ps(s[v], _mm512_set1_ps(now)));
        s[v] = _mm512_maskz_mov_ps((__mmask16)(visible >> 16 * v), p);
        total = _mm512_add_ps(total, s[v]);
        _mm512_storeu_ps(scores + 16 * v, s[v]);
    }
    const float before = now > *highest ? expf(*highest - now) : 1;
    *highest = now;
    *sum = *sum * before + _mm512_reduce_add_ps(total);
    return before;
}

/* weights * step as 128 * high + low, of products up to `largest`: high[BLOCK], low[BLOCK] bytes in the order of units;
 * returns their scale. */
static inline float in_bytes(const float *weights, const float *step, float largest, int8_t *bytes) {
    __m512i y[LANES], high[2], low[2];
    const __m512 scale = _mm512_set1_ps(largest > TINY ? FINE / largest : 0);
    for (int v = 0; v < LANES; v++) {
        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(weights + 16 * v), _mm512_loadu_ps(step + 16 * v));
        y[v] = _mm512_cvtps_epi32(_mm512_mul_ps(x, scale));
    }
    for (int i = 0; i < 2; i++) {
        const __m512i both = _mm512_packs_epi32(y[2 * i], y[2 * i + 1]);
        high[i] = _mm512_srai_epi16(_mm512_add_epi16(both, _mm512_set1_epi16(64)), 7);
        low[i] = _mm512_sub_epi16(both, _mm512_slli_epi16(high[i], 7));
    }
    _mm512_storeu_si512(bytes, _mm512_packs_epi16(high[0], high[1]));
    _mm512_storeu_si512(bytes + BLOCK, _mm512_packs_epi16(low[0], low[1]));
    return largest > TINY ? largest * (1.0f / FINE) : 0;
}

/* `count` queries x `vectors` x 16 components: out = before * out + scale * (weights in bytes) codes. Strides of a query:
 * `stride` of bytes, `width` of out, `groups` of scale. */
static inline __attribute__((always_inline)) void gather_codes(const int count, const int vectors, const int8_t *bytes,
                                                               long stride, const uint8_t *units, const float *scale,
                                                               long groups, const float *before, float *out,
                                                               long width) {
    __m512i sum[AT_ONCE][4];
#pragma GCC unroll 6
    for (int a = 0; a < count; a++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[a][v] = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        if (half)
#pragma GCC unroll 6
            for (int a = 0; a < count; a++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) sum[a][v] = _mm512_slli_epi32(sum[a][v], 7);
        for (int u = 0; u < UNITS; u++) {
            __m512i x[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) x[v] = _mm512_loadu_si512(units + (v * UNITS + u) * 64);
#pragma GCC unroll 6
            for (int a = 0; a < count; a++) {
                int32_t weight;
                memcpy(&weight, bytes + a * stride + half * BLOCK + 4 * u, 4);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    add_bytes(&sum[a][v], x[v], _mm512_set1_epi32(weight));
            }
        }
    }
#pragma GCC unroll 6
    for (int a = 0; a < count; a++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float *to = out + a * width + 16 * v;
            const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(before[a]));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[a][v]), _mm512_set1_ps(scale[a * groups]), old));
        }
}

static inline __attribute__((always_inline)) void gather_vectors(const int count, long vectors, const int8_t *bytes,
                                                                 long stride, const uint8_t *units, const float *scale,
                                                                 long groups, const float *before, float *out,
                                                                 long width) {
    switch (vectors) {
    case 4: gather_codes(count, 4, bytes, stride, units, scale, groups, before, out, width); break;
    case 3: gather_codes(count, 3, bytes, stride, units, scale, groups, before, out, width); break;
    case 2: gather_codes(count, 2, bytes, stride, units, scale, groups, before, out, width); break;
    default: gather_codes(count, 1, bytes, stride, units, scale, groups, before, out, width);
    }
}

/* The averages of all queries and components, one block further. */
static void average(const struct reading *all, const uint8_t *codes, const long *row, const int8_t *bytes,
                    uint8_t *units, const float *scale, const float *before, float *out) {
    const long most = share(all->h), width = 16 * all->vectors, groups = all->groups, stride = groups * 2 * BLOCK;
    for (long e = 0; e < groups; e++) {
        units_of(codes, row, all->group + e, units);
        for (long c = 0, some; c < all->group[e].vectors; c += some) {
            const long left = all->group[e].vectors - c, pieces = (left + 3) / 4;
            some = (left + pieces - 1) / pieces;
            const long vector = all->group[e].vector + c;
            const uint8_t *unit = units + c * UNITS * 64;
            for (long i = 0; i < all->h; i += most) {
                const int8_t *w = bytes + i * stride + e * 2 * BLOCK;
                const float *s = scale + i * groups + e, *b = before + i;
                float *to = out + i * width + 16 * vector;
                switch (all->h - i < most ? all->h - i : most) {
                case 6: gather_vectors(6, some, w, stride, unit, s, groups, b, to, width); break;
                case 5: gather_vectors(5, some, w, stride, unit, s, groups, b, to, width); break;
                case 4: gather_vectors(4, some, w, stride, unit, s, groups, b, to, width); break;
                case 3: gather_vectors(3, some, w, stride, unit, s, groups, b, to, width); break;
                case 2: gather_vectors(2, some, w, stride, unit, s, groups, b, to, width); break;
                default: gather_vectors(1, some, w, stride, unit, s, groups, b, to, width);
                }
            }
        }
    }
}

/* The codes of a group in bytes: codes[size / 4][BLOCK], each word's codes k side by side, in the order of `lay_decoder`. */
static inline __attribute__((always_inline)) void spread(const uint32_t *words, long count, const int bits,
                                                         uint32_t *codes) {
    for (long j = 0; j < count; j++)
        for (int v = 0; v < BLOCK; v += 16) {
            const __m512i x = _mm512_loadu_si512(words + j * BLOCK + v);
#pragma GCC unroll 4
            for (int k = 0; k < 8 / bits; k++)
                _mm512_storeu_si512(codes + (j * (8 / bits) + k) * BLOCK + v,
                                    _mm512_and_si512(_mm512_srli_epi16(x, k * bits),
                                                     _mm512_set1_epi8((char)((1 << bits) - 1))));
        }
}

/* keys[d4][BLOCK] += a group's share: step * (scale * (rows in bytes) codes + rest) + low * sum; they start from 0 unless
 * `more`. */
static void rebuild(const struct group *group, const int8_t *rows, long d4, const float *factors, const uint32_t *codes,
                    const float *low, const float *step, const long more, float *keys) {
    const long size = group->size;
    for (long c = 0; c < d4; c += 4) {
        __m512i sum[4][LANES];
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++)
#pragma GCC unroll 4
            for (int v = 0; v < LANES; v++) sum[a][v] = _mm512_setzero_si512();
        for (int half = 0; half < (group->bits > COARSE ? 2 : 1); half++) {
            const int8_t *row = rows + (half * d4 + c) * size;
            if (half)
#pragma GCC unroll 4
                for (int a = 0; a < 4; a++)
#pragma GCC unroll 4
                    for (int v = 0; v < LANES; v++) sum[a][v] = _mm512_slli_epi32(sum[a][v], 7);
            for (long j = 0; j < size / 4; j++) {
                __m512i x[LANES];
#pragma GCC unroll 4
                for (int v = 0; v < LANES; v++) x[v] = _mm512_loadu_si512(codes + j * BLOCK + 16 * v);
#pragma GCC unroll 4
                for (int a = 0; a < 4; a++) {
                    int32_t factor;
                    memcpy(&factor, row + a * size + 4 * j, 4);
#pragma GCC unroll 4
                    for (int v = 0; v < LANES; v++)
                        add_bytes(&sum[a][v], x[v], _mm512_set1_epi32(factor));
                }
            }
        }
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) {
            const __m512 scale = _mm512_set1_ps(factors[c + a]), rest = _mm512_set1_ps(factors[d4 + c + a]);
            const __m512 whole = _mm512_set1_ps(factors[2 * d4 + c + a]);
#pragma GCC unroll 4
            for (int v = 0; v < LANES; v++) {
                float *to = keys + (c + a) * BLOCK + 16 * v;
                __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[a][v]), scale, rest);
                const __m512 old = more ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
                x = _mm512_fmadd_ps(x, _mm512_loadu_ps(step + 16 * v), old);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(whole, _mm512_loadu_ps(low + 16 * v), x));
            }
        }
    }
}

/* One row of a decoder, of one group: its bytes in the order of `spread`, and factors scale, rest and sum. `rest` keeps the
 * codes' middle exact, whatever the bytes round away, so that a rounded factor counts by a code's distance from there. With
 * one byte of the largest factor, about 2.6 deviations of 128 normal ones, it is off by 0.006 deviations; codes of 4 bits
 * are 3.5 steps from the middle and off by 0.29 steps themselves, 14 times as much. Codes of 8 bits get both bytes. */
static void lay_decoder(const bf16 *row, const struct group *group, int8_t *high, int8_t *low, float *factors, long d4) {
    const long size = group->size, bits = group->bits, fine = bits > COARSE;
    int8_t bytes[2][LARGEST];
    float largest = 0, sum = 0;
    long total = 0;
    for (long c = 0; c < size; c += 16) {
        const __m512 x = load_floats(row + c, 0xffff);
        largest = fmaxf(largest, _mm512_reduce_max_ps(_mm512_abs_ps(x))), sum += _mm512_reduce_add_ps(x);
    }
    const float most = fine ? FINE : 127, scale = largest > TINY ? most / largest : 0;
    for (long c = 0; c < size; c += 16) {
        const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(load_floats(row + c, 0xffff), _mm512_set1_ps(scale)));
        const __m512i top = fine ? _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(64)), 7) : x;
        total += _mm512_reduce_add_epi32(x);
        _mm_storeu_si128((__m128i *)(bytes[0] + c), _mm512_cvtepi32_epi8(top));
        _mm_storeu_si128((__m128i *)(bytes[1] + c),
                         _mm512_cvtepi32_epi8(_mm512_sub_epi32(x, _mm512_slli_epi32(top, 7))));
    }
    const __m128i order =
        bits == 8   ? _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
        : bits == 4 ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                    : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (long c = 0; c < size; c += 16) {
        _mm_storeu_si128((__m128i *)(high + c), _mm_shuffle_epi8(_mm_loadu_si128((__m128i *)(bytes[0] + c)), order));
        _mm_storeu_si128((__m128i *)(low + c), _mm_shuffle_epi8(_mm_loadu_si128((__m128i *)(bytes[1] + c)), order));
    }
    const float back = largest > TINY ? largest / most : 0;
    factors[0] = back;
    factors[d4] = 0.5f * ((1 << bits) - 1) * (sum - back * total);
    factors[2 * d4] = sum;
}

/* Channels c and c + d / 2 of the keys of a block and their mean, turned by the angles of the places in a block. */
static void turn_keys(float *keys, const float *mean, long half, const float *places) {
    for (long c = 0; c < half; c++) {
        const __m512 a = _mm512_set1_ps(mean[c]), b = _mm512_set1_ps(mean[half + c]);
        for (int v = 0; v < BLOCK; v += 16) {
            float *first = keys + c * BLOCK + v, *second = keys + (half + c) * BLOCK + v;
            const __m512 cosine = _mm512_loadu_ps(places + 2 * c * BLOCK + v);
            const __m512 sine = _mm512_loadu_ps(places + (2 * c + 1) * BLOCK + v);
            const __m512 x = _mm512_add_ps(_mm512_loadu_ps(first), a), y = _mm512_add_ps(_mm512_loadu_ps(second), b);
            _mm512_storeu_ps(first, _mm512_fnmadd_ps(y, sine, _mm512_mul_ps(x, cosine)));
            _mm512_storeu_ps(second, _mm512_fmadd_ps(x, sine, _mm512_mul_ps(y, cosine)));
        }
    }
}

/* Queries [columns][h] turned back by a block's angles. */
static void turn_queries(const struct reading *all, const float *queries, const float *cosines, const float *sines,
                         float *turned) {
    const long h = all->h;
    for (long p = 0; p < all->pairs; p++) {
        const int32_t *turn = all->turns + 3 * p;
        const __m512 cosine = _mm512_set1_ps(cosines[turn[2]]), sine = _mm512_set1_ps(sines[turn[2]]);
        const float *first = queries + turn[0] * h, *second = queries + turn[1] * h;
        for (long i = 0; i < h; i += 16) {
            const __mmask16 mask = lanes(h - i);
            const __m512 x = _mm512_maskz_loadu_ps(mask, first + i), y = _mm512_maskz_loadu_ps(mask, second + i);
            _mm512_mask_storeu_ps(turned + turn[0] * h + i, mask, _mm512_fmadd_ps(y, sine, _mm512_mul_ps(x, cosine)));
            _mm512_mask_storeu_ps(turned + turn[1] * h + i, mask, _mm512_fnmadd_ps(x, sine, _mm512_mul_ps(y, cosine)));
        }
    }
}

/* A place in memory that is cut into pieces, each at a cache line. With nothing to cut, it only counts. */
static void *cut(char **from, long bytes) {
    char *piece = *from;
    *from += round_up(bytes, 64);
    return piece;
}

struct scratch {
    uint32_t *words, *codes, *pairs, *rows;
    int32_t *sums;
    uint8_t *units;
    float *tile, *queries, *scores, *scale, *before, *low, *step, *widest, *turn;
    int8_t *bytes;
};

static long cut_scratch(const struct reading *all, char *from, struct scratch *to) {
    char *at = from;
    to->words = cut(&at, 4 * BLOCK * 4);
    to->codes = cut(&at, all->d && !all->tiles ? all->r * BLOCK : 0);
    to->units = cut(&at, (LARGEST / 16 + 3) * UNITS * 64); /* the last 16 bytes of 2 bits may be 4 */
    to->tile = cut(&at, all->rows * BLOCK * 4);
    to->queries = cut(&at, all->columns * all->h * 4);
    to->scores = cut(&at, all->padded_h * BLOCK * 4);
    to->scale = cut(&at, all->h * all->groups * 4);
    to->before = cut(&at, all->h * 4);
    to->low = cut(&at, all->groups * BLOCK * 4);
    to->step = cut(&at, all->groups * BLOCK * 4);
    to->widest = cut(&at, all->groups * 4);
    to->bytes = cut(&at, all->padded_h * all->groups * 2 * BLOCK);
    to->pairs = cut(&at, all->tiles ? LANES * all->padded_pairs * 64 : 0);
    to->rows = cut(&at, all->tiles && !all->d ? all->padded_h * (all->padded_pairs + 2 * all->padded_half) * 4 : 0);
    to->turn = cut(&at, all->tiles && !all->d ? 2 * (all->padded_pairs + all->padded_half) * 4 : 0);
    to->sums = cut(&at, all->tiles ? 4 * 16 * 16 * 4 : 0);
    return at - from;
}

/* Two vectors of fp32 as bf16, side by side: the first in the lower half of each lane. */
static inline __attribute__((always_inline)) __m512i in_pairs(__m512 first, __m512 second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* What two numbers in bf16 miss of them, in bf16. */
static inline __attribute__((always_inline)) __m512i rest_of(__m512i near, __m512 first, __m512 second) {
    const __m512 upper = _mm512_castsi512_ps(_mm512_and_si512(near, _mm512_set1_epi32((int)0xffff0000)));
    const __m512 lower = _mm512_castsi512_ps(_mm512_slli_epi32(near, 16));
    return in_pairs(_mm512_sub_ps(first, lower), _mm512_sub_ps(second, upper));
}

/* pairs[LANES][padded][16]: two components of 16 tokens, turned by the angles of the places in a block if there are turns. */
static inline __attribute__((always_inline)) void pair_words(const uint32_t *words, long count, const int bits,
                                                             const float *low, const float *step, const int32_t *turns,
                                                             const float *places, long padded, uint32_t *pairs) {
    for (long j = 0; j < count; j++, words += BLOCK, turns += turns ? 3 * (16 / bits) : 0, pairs += 16 / bits * 16)
        for (int v = 0; v < LANES; v++) {
            const __m512i x = _mm512_loadu_si512(words + 16 * v);
            const __m512 l = _mm512_loadu_ps(low + 16 * v), s = _mm512_loadu_ps(step + 16 * v);
#pragma GCC unroll 8
            for (int m = 0; m < 16 / bits; m++) {
                __m512 re = _mm512_fmadd_ps(code_of(x, bits, 2 * m), s, l);
                __m512 im = _mm512_fmadd_ps(code_of(x, bits, 2 * m + 1), s, l);
                if (turns) {
                    const float *turn = places + 2 * BLOCK * turns[3 * m + 2] + 16 * v;
                    const __m512 cosine = _mm512_loadu_ps(turn), sine = _mm512_loadu_ps(turn + BLOCK), was = re;
                    re = _mm512_fnmadd_ps(im, sine, _mm512_mul_ps(re, cosine));
                    im = _mm512_fmadd_ps(was, sine, _mm512_mul_ps(im, cosine));
                }
                _mm512_storeu_si512(pairs + (v * padded + m) * 16, in_pairs(re, im));
            }
        }
}

/* The pairs of a block's components, or of those of keys only. */
static void lay_pairs(const struct reading *all, const struct scratch *my, const uint8_t *codes, const long *row) {
    for (long e = 0; e < all->groups && (all->d || all->group[e].first < all->rk); e++) {
        const struct group *group = all->group + e;
        const long bits = group->bits;
        for (long j = 0; j < group->bytes / 4; j += 4) {
            const long count = words_from(group, j), first = (group->first + j * 32 / bits) / 2;
            const float *low = my->low + e * BLOCK, *step = my->step + e * BLOCK;
            const int32_t *turns = all->d ? 0 : all->turns + 3 * first;
            uint32_t *to = my->pairs + 16 * first;
            words_of(codes, row, group, j, my->words);
            switch (bits) {
            case 8: pair_words(my->words, count, 8, low, step, turns, all->places, all->padded_pairs, to); break;
            case 4: pair_words(my->words, count, 4, low, step, turns, all->places, all->padded_pairs, to); break;
            default: pair_words(my->words, count, 2, low, step, turns, all->places, all->padded_pairs, to);
            }
        }
    }
}

/* rows[padded_h][padded_pairs + 2 padded_half]: queries turned back by a block's angles in bf16, those of the mean in two
 * parts, since a mean may be hundreds of times as large as what differs from it. */
static void turn_rows(const struct reading *all, const float *cosines, const float *sines, float *turn, uint32_t *rows) {
    const long padded = all->padded_pairs, width = padded + all->padded_half, pairs = all->rk / 2;
    for (long p = 0; p < pairs; p++) {
        const long f = all->turns[3 * p + 2];
        turn[p] = cosines[f], turn[width + p] = sines[f];
    }
    memcpy(turn + padded, cosines, all->half * sizeof *turn);
    memcpy(turn + width + padded, sines, all->half * sizeof *turn);
    for (long i = 0; i < all->h; i++, rows += width + all->padded_half) {
        const float *re = all->planes + 2 * i * width, *im = re + width;
        for (long p = 0; p < width; p += 16) {
            const __m512 cosine = _mm512_loadu_ps(turn + p), sine = _mm512_loadu_ps(turn + width + p);
            const __m512 x = _mm512_loadu_ps(re + p), y = _mm512_loadu_ps(im + p);
            const __m512 a = _mm512_fmadd_ps(y, sine, _mm512_mul_ps(x, cosine));
            const __m512 b = _mm512_fnmadd_ps(x, sine, _mm512_mul_ps(y, cosine));
            const __m512i near = in_pairs(a, b);
            _mm512_storeu_si512(rows + p, near);
            if (p >= padded) _mm512_storeu_si512(rows + p + all->padded_half, rest_of(near, a, b));
        }
    }
}

/* The angles of the places as two bf16 parts, as `turn_rows` has queries of the mean. */
static void lay_places(const struct reading *all) {
    for (long f = 0; f < all->half; f++)
        for (long v = 0; v < LANES; v++) {
            const float *from = all->places + 2 * f * BLOCK + 16 * v;
            const __m512 cosine = _mm512_loadu_ps(from), sine = _mm512_loadu_ps(from + BLOCK);
            const __m512i near = in_pairs(cosine, sine);
            uint32_t *to = all->place_pairs + (v * all->padded_half + f) * 16;
            _mm512_storeu_si512(to, near);
            _mm512_storeu_si512(to + LANES * all->padded_half * 16, rest_of(near, cosine, sine));
        }
}

#ifdef __AMX_BF16__
/* gcc does not know that loading a tile reads memory. */
#define WRITTEN __asm__ volatile("" ::: "memory")

/* Tiles 0 to 3 are sums of 16 columns, 4 and 5 have the rows that are multiplied, 6 and 7 what with. */
static void shape_tiles(long rows) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = (uint8_t)(i < 6 ? rows : 16);
    WRITTEN;
    _tile_loadconfig(&shape);
}

/* Adds rows times pairs[LANES][padded][16] to tiles 0 to 3. */
static inline __attribute__((always_inline)) void add_tiles(const uint32_t *rows, long stride, const uint32_t *pairs,
                                                            long padded) {
    for (long p = 0; p < padded; p += 16, pairs += 256) {
        _tile_loadd(4, rows + p, stride * 4);
        _tile_loadd(6, pairs, 64); _tile_loadd(7, pairs + padded * 16, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, pairs + 2 * padded * 16, 64); _tile_loadd(7, pairs + 3 * padded * 16, 64);
        _tile_dpbf16ps(2, 4, 6); _tile_dpbf16ps(3, 4, 7);
    }
}

/* to[rows of a tile][BLOCK] are the sums. */
static inline __attribute__((always_inline)) void store_tiles(float *to) {
    _tile_stored(0, to, BLOCK * 4); _tile_stored(1, to + 16, BLOCK * 4);
    _tile_stored(2, to + 32, BLOCK * 4); _tile_stored(3, to + 48, BLOCK * 4);
}

/* scores[h][BLOCK]: queries times turned pairs, and times the places' angles but for the rest of both. */
static void score_tiles(const struct reading *all, const struct scratch *my) {
    const long padded = all->padded_pairs, half = all->padded_half, width = padded + 2 * half;
    WRITTEN;
    for (long i = 0; i < all->h; i += all->query_rows) {
        const uint32_t *rows = my->rows + i * width, *rest = all->place_pairs + LANES * half * 16;
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        add_tiles(rows, width, my->pairs, padded);
        add_tiles(rows + padded, width, all->place_pairs, half);
        add_tiles(rows + padded, width, rest, half);
        add_tiles(rows + padded + half, width, all->place_pairs, half);
        store_tiles(my->scores + i * BLOCK);
    }
}

/* keys[rows][BLOCK] of a kv head before RoPE and without their mean, from pairs of components. */
static void rebuild_tiles(const struct reading *all, const struct scratch *my, long g) {
    const long padded = all->padded_pairs;
    WRITTEN;
    for (long c = 0; c < all->whole_rows; c += 16) {
        const bf16 *rows = all->whole + (g * all->whole_rows + c) * 2 * padded;
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        add_tiles((const uint32_t *)rows, padded, my->pairs, padded);
        store_tiles(my->tile + c * BLOCK);
    }
}

/* out[rows][stride] = before * out + scale * (128 * high + low) for one or two vectors, sums being [vectors][high, low][16][16]. */
static inline __attribute__((always_inline)) void add_sums(const int vectors, long rows, const int32_t *sums,
                                                           const float *scale, long groups, const float *before,
                                                           float *out, long stride) {
    for (long a = 0; a < rows; a++, sums += 16, scale += groups, out += stride) {
        const __m512 s = _mm512_set1_ps(*scale), b = _mm512_set1_ps(before[a]);
#pragma GCC unroll 2
        for (int k = 0; k < vectors; k++) {
            const __m512i high = _mm512_slli_epi32(_mm512_loadu_si512(sums + 512 * k), 7);
            const __m512i sum = _mm512_add_epi32(high, _mm512_loadu_si512(sums + 512 * k + 256));
            const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(out + 16 * k), b);
            _mm512_storeu_ps(out + 16 * k, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s, old));
        }
    }
}

/* As `average`. */
static void average_tiles(const struct reading *all, const struct scratch *my, const uint8_t *codes, const long *row,
                          float *out) {
    const long h = all->h, width = 16 * all->vectors, groups = all->groups, stride = groups * 2 * BLOCK;
    const long m = all->query_rows;
    int32_t *sums = my->sums;
    for (long e = 0; e < groups; e++) {
        const long vectors = all->group[e].vectors;
        units_of(codes, row, all->group + e, my->units);
        WRITTEN;
        for (long i = 0; i < h; i += m) {
            const int8_t *bytes = my->bytes + i * stride + e * 2 * BLOCK;
            const float *scale = my->scale + i * groups + e, *before = my->before + i;
            const long rows = h - i < m ? h - i : m;
            float *to = out + i * width + 16 * all->group[e].vector;
            const uint8_t *units = my->units;
            _tile_loadd(4, bytes, stride); _tile_loadd(5, bytes + BLOCK, stride);
            for (long v = vectors; v > 1; v -= 2, units += 2 * UNITS * 64, to += 32) {
                _tile_zero(0); _tile_zero(1); _tile_loadd(6, units, 64);
                _tile_dpbsud(0, 4, 6); _tile_dpbsud(1, 5, 6);
                _tile_zero(2); _tile_zero(3); _tile_loadd(7, units + UNITS * 64, 64);
                _tile_dpbsud(2, 4, 7); _tile_dpbsud(3, 5, 7);
                _tile_stored(0, sums, 64); _tile_stored(1, sums + 256, 64);
                _tile_stored(2, sums + 512, 64); _tile_stored(3, sums + 768, 64);
                add_sums(2, rows, sums, scale, groups, before, to, width);
            }
            if (vectors % 2) {
                _tile_zero(0); _tile_zero(1); _tile_loadd(6, units, 64);
                _tile_dpbsud(0, 4, 6); _tile_dpbsud(1, 5, 6);
                _tile_stored(0, sums, 64); _tile_stored(1, sums + 256, 64);
                add_sums(1, rows, sums, scale, groups, before, to, width);
            }
        }
    }
}
#else
static void shape_tiles(long rows) { (void)rows; }
static void score_tiles(const struct reading *all, const struct scratch *my) { (void)all, (void)my; }
static void rebuild_tiles(const struct reading *all, const struct scratch *my, long g) { (void)all, (void)my, (void)g; }
static void average_tiles(const struct reading *all, const struct scratch *my, const uint8_t *codes, const long *row,
                          float *out) {
    (void)all, (void)my, (void)codes, (void)row, (void)out;
}
#endif

static int tiles_allowed = 0;

/* Whether to use matrix tiles, if the processor and the system let this process; returns whether they are used. */
int mea_use_tiles(int wanted) {
    tiles_allowed = 0, (void)wanted;
#ifdef __AMX_BF16__
    /* Linux gives a process the registers on request: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA. */
    tiles_allowed = wanted && !syscall(SYS_arch_prctl, 0x1023, 18);
#endif
    return tiles_allowed;
}

/* Scores of a block, predictive: pairs are turned and multiplied; the constant part of the keys is the angles alone. */
static void score_pairs(const struct reading *all, const struct scratch *my, const uint8_t *codes, const long *row) {
    const long h = all->h;
    if (all->tiles) {
        lay_pairs(all, my, codes, row);
        score_tiles(all, my);
        return;
    }
    multiply(h, my->queries + all->rk * h, h, all->places, 2 * all->half, my->scores);
    for (long e = 0; e < all->groups && all->group[e].first < all->rk; e++) {
        const struct group *group = all->group + e;
        const long bits = group->bits;
        for (long j = 0; j < group->bytes / 4; j += 4) {
            const long count = words_from(group, j), first = group->first + j * 32 / bits;
            const uint32_t *words = my->words;
            const float *low = my->low + e * BLOCK, *step = my->step + e * BLOCK;
            const int32_t *turns = all->turns + first / 2 * 3;
            words_of(codes, row, group, j, my->words);
            switch (bits) {
            case 8: turn_words(words, count, 8, low, step, turns, all->places, my->tile); break;
            case 4: turn_words(words, count, 4, low, step, turns, all->places, my->tile); break;
            default: turn_words(words, count, 2, low, step, turns, all->places, my->tile);
            }
            multiply(h, my->queries + first * h, h, my->tile, count * 32 / bits, my->scores);
        }
    }
}

/* The codes of a block in bytes, group by group. */
static void spread_groups(const struct reading *all, const struct scratch *my, const uint8_t *codes, const long *row) {
    for (long e = 0; e < all->groups; e++) {
        const struct group *group = all->group + e;
        uint32_t *to = my->codes + group->first / 4 * BLOCK;
        for (long j = 0; j < group->bytes / 4; j += 4, to += 4 * (8 / group->bits) * BLOCK) {
            const long count = words_from(group, j);
            words_of(codes, row, group, j, my->words);
            switch (group->bits) {
            case 8: spread(my->words, count, 8, to); break;
            case 4: spread(my->words, count, 4, to); break;
            default: spread(my->words, count, 2, to);
            }
        }
    }
}

/* The keys of a head of a block, without their mean. */
static void rebuild_groups(const struct reading *all, const struct scratch *my, long g) {
    for (long e = 0; e < all->groups; e++) {
        const struct group *group = all->group + e;
        rebuild(group, all->decoder + 2 * all->d4 * (g * all->r + group->first), all->d4,
                all->factors + (g * all->groups + e) * 3 * all->d4, my->codes + group->first / 4 * BLOCK,
                my->low + e * BLOCK, my->step + e * BLOCK, e, my->tile);
    }
}

/* Scores of a block, joint: the keys of one head after the other are rebuilt, turned and multiplied. */
static void score_joint(const struct reading *all, const struct scratch *my, const uint8_t *codes, const long *row) {
    const long some = all->h / all->g;
    if (all->tiles) {
        lay_pairs(all, my, codes, row);
        shape_tiles(16);
    } else {
        spread_groups(all, my, codes, row);
    }
    for (long g = 0; g < all->g; g++) {
        if (all->tiles) rebuild_tiles(all, my, g);
        else rebuild_groups(all, my, g);
        turn_keys(my->tile, all->mean + g * all->d4, all->half, all->places);
        multiply(some, my->queries + g * some, all->h, my->tile, all->d, my->scores + g * some * BLOCK);
    }
    if (all->tiles) shape_tiles(all->query_rows);
}

/* n tokens of one sequence, from the start of a block: unnormalised out[h][16 vectors] and lows[h][groups][16], and each
 * query's maximum and sum of exponentials. */
static void read_part(const struct reading *all, const float *queries, const uint8_t *codes, const bf16 *scales,
                      const uint8_t *hidden, const float *cosines, const float *sines, long n,
                      const struct scratch *my, float *out, float *lows, float *highest, float *sum) {
    const long h = all->h, groups = all->groups;
    memset(out, 0, h * 16 * all->vectors * sizeof *out);
    memset(lows, 0, h * groups * 16 * sizeof *lows);
    for (long i = 0; i < h; i++) highest[i] = NONE, sum[i] = 0;
    if (all->tiles) { /* what is never written and read with a factor of 0 must not be NaN */
        const long pairs = all->d ? all->r / 2 : all->rk / 2;
        for (long v = 0; v < LANES; v++)
            memset(my->pairs + (v * all->padded_pairs + pairs) * 16, 0, (all->padded_pairs - pairs) * 64);
        if (!all->d) memset(my->rows, 0, all->padded_h * (all->padded_pairs + 2 * all->padded_half) * 4);
        if (!all->d) memset(my->turn, 0, 2 * (all->padded_pairs + all->padded_half) * 4);
        shape_tiles(all->query_rows);
    }
    for (long start = 0; start < n; start += BLOCK, cosines += all->half, sines += all->half) {
        const long count = n - start < BLOCK ? n - start : BLOCK;
        const uint8_t *from = codes + start * all->code_stride;
        uint64_t visible = count == BLOCK ? ~0ull : (1ull << count) - 1;
        if (hidden)
            visible = _mm512_mask_cmpeq_epi8_mask(visible, _mm512_maskz_loadu_epi8(visible, hidden + start),
                                                  _mm512_setzero_si512());
        if (!visible) continue;
        long row[BLOCK];
        for (long u = 0; u < BLOCK; u++) row[u] = (u < count ? u : count - 1) * all->code_stride;
        lay_scales(scales + start * all->scale_stride, all->scale_stride, groups, visible, my->low, my->step, my->widest);
        if (all->tiles && !all->d) turn_rows(all, cosines, sines, my->turn, my->rows);
        else turn_queries(all, queries, cosines, sines, my->queries);
        memset(my->scores, 0, h * BLOCK * sizeof(float));
        if (all->d) score_joint(all, my, from, row);
        else score_pairs(all, my, from, row);
        for (long i = 0; i < h; i++) {
            float *weights = my->scores + i * BLOCK;
            float largest;
            const float before = my->before[i] = weigh_visible(weights, visible, highest + i, sum + i, &largest);
            for (long e = 0; e < groups; e++) {
                const long place = i * groups + e;
                my->scale[place] =
                    in_bytes(weights, my->step + e * BLOCK, 1.001f * largest * my->widest[e], my->bytes + place * 2 * BLOCK);
                __m512 x = _mm512_mul_ps(_mm512_loadu_ps(lows + place * 16), _mm512_set1_ps(before));
                for (int v = 0; v < BLOCK; v += 16)
                    x = _mm512_fmadd_ps(_mm512_loadu_ps(weights + v), _mm512_loadu_ps(my->low + e * BLOCK + v), x);
                _mm512_storeu_ps(lows + place * 16, x);
            }
        }
        if (all->tiles) average_tiles(all, my, from, row, out);
        else average(all, from, row, my->bytes, my->units, my->scale, my->before, out);
    }
}

/* The parts of one query: its average in the order of components, and its log of the sum of exponentials. */
static void join_parts(const struct reading *all, const float *part, long parts, long of_part, long i, float *average,
                       float *lse) {
    const long width = 16 * all->vectors, groups = all->groups, h = all->h;
    const float *lows = part + h * width, *highest = lows + h * groups * 16, *sum = highest + h;
    float top = NONE, total = 0;
    for (long p = 0; p < parts; p++) top = fmaxf(top, highest[p * of_part + i]);
    for (long p = 0; p < parts; p++) total += expf(highest[p * of_part + i] - top) * sum[p * of_part + i];
    *lse = total > 0 ? top + logf(total) : NONE;
    for (long e = 0; e < groups; e++) {
        const struct group *group = all->group + e;
        const long per = 8 / group->bits;
        float shares[parts], low = 0;
        for (long p = 0; p < parts; p++) {
            shares[p] = total > 0 ? expf(highest[p * of_part + i] - top) / total : 0;
            low += shares[p] * _mm512_reduce_add_ps(_mm512_loadu_ps(lows + p * of_part + (i * groups + e) * 16));
        }
        for (long v = 0; v < group->vectors; v++) {
            const long left = group->bytes - v / per * 16, first = group->first + v / per * 16 * per + v % per;
            __m512 x = _mm512_set1_ps(low);
            for (long p = 0; p < parts; p++)
                x = _mm512_fmadd_ps(_mm512_set1_ps(shares[p]),
                                    _mm512_loadu_ps(part + p * of_part + i * width + 16 * (group->vector + v)), x);
            _mm512_mask_i32scatter_ps(average + first, lanes(left),
                                      multiples(per), x, 4);
        }
    }
}

/* What a new token reads, and the maps of its layer; `mea.ops.cpu._Packed` mirrors it. b sequences, h queries, g kv heads of
 * width 2 * half; numbers are contiguous but for the strides (bytes of codes, else numbers). */
struct packed {
    const bf16 *queries;                       /* [b][h][2 half], before RoPE */
    const bf16 *keys, *values;                 /* [b][g][recent][2 half], keys before RoPE; the last token is the new one */
    const bf16 *first_keys, *first_values;     /* [b][g][first][2 half] */
    const float *exact_cosines, *exact_sines;  /* [b or 1][first + recent][half] */
    const uint8_t *codes;                      /* of n tokens from the first that is read, and so scales and hidden */
    const bf16 *scales;
    const uint8_t *hidden;                     /* [b][n] or none */
    const float *block_cosines, *block_sines;  /* [b or 1][blocks][half] */
    const float *place_cosines, *place_sines;  /* [BLOCK][half] */
    const int32_t *frequency;                  /* [rk / 2]; without it, keys are rebuilt */
    const float *key_pairs;                    /* [g][rk / 2][re, im] of the predictive form */
    const bf16 *key_decoder;                   /* [g][2 half up to 16][r up to 32] of the joint form, zeros behind */
    const float *key_mean;                     /* [g][2 half] */
    const bf16 *value_decoder;                 /* [g][2 half][r] */
    const float *value_mean;                   /* [g][2 half] */
    const long *groups;                        /* bits and size of each */
    float *output;                             /* [b][h][2 half] */
    long b, h, g, half, n, rk, group_count, recent, first;
    long code_stride, scale_stride, code_sequence, scale_sequence, angle_sequence, exact_sequence;
    long keys_sequence, keys_head, values_sequence, values_head;
    float scale;
    int threads;
};

/* Attention of some queries [some][2 half], turned and scaled, over the exact tokens of a kv head: out[some][2 half] and
 * its log of the sum of exponentials. `weights` is scratch: [some][first + recent], then a key. */
static void read_exact(const struct packed *all, long s, long g, long some, const float *queries, float *weights,
                       float *out, float *lse) {
    const long half = all->half, d = 2 * half, first = all->first, tokens = first + all->recent;
    const bf16 *first_keys = all->first_keys + (s * all->g + g) * first * d;
    const bf16 *first_values = all->first_values + (s * all->g + g) * first * d;
    const bf16 *keys = all->keys + s * all->keys_sequence + g * all->keys_head;
    const bf16 *values = all->values + s * all->values_sequence + g * all->values_head;
    float *key = weights + some * tokens;
    for (long t = 0; t < tokens; t++) {
        const bf16 *from = t < first ? first_keys + t * d : keys + (t - first) * d;
        const long angle = s * all->exact_sequence + t * half;
        for (long c = 0; c < half; c += 16) {
            const __mmask16 mask = lanes(half - c);
            const __m512 cosine = _mm512_maskz_loadu_ps(mask, all->exact_cosines + angle + c);
            const __m512 sine = _mm512_maskz_loadu_ps(mask, all->exact_sines + angle + c);
            const __m512 x = load_floats(from + c, mask), y = load_floats(from + half + c, mask);
            _mm512_mask_storeu_ps(key + c, mask, _mm512_fnmadd_ps(y, sine, _mm512_mul_ps(x, cosine)));
            _mm512_mask_storeu_ps(key + half + c, mask, _mm512_fmadd_ps(x, sine, _mm512_mul_ps(y, cosine)));
        }
        for (long i = 0; i < some; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (long c = 0; c < d; c += 16) {
                const __mmask16 mask = lanes(d - c);
                sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, queries + i * d + c),
                                      _mm512_maskz_loadu_ps(mask, key + c), sum);
            }
            weights[i * tokens + t] = _mm512_reduce_add_ps(sum);
        }
    }
    for (long i = 0; i < some; i++) {
        float *w = weights + i * tokens, top = NONE, total = 0;
        for (long t = 0; t < tokens; t++) top = fmaxf(top, w[t]);
        for (long t = 0; t < tokens; t += 16) {
            const __mmask16 mask = lanes(tokens - t);
            const __m512 x = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, w + t), _mm512_set1_ps(top)));
            _mm512_mask_storeu_ps(w + t, mask, x);
            total += _mm512_mask_reduce_add_ps(mask, x);
        }
        lse[i] = top + logf(total);
        for (long c = 0; c < d; c += 16) {
            const __mmask16 mask = lanes(d - c);
            __m512 sum = _mm512_setzero_ps();
            for (long t = 0; t < tokens; t++) {
                const bf16 *from = t < first ? first_values + t * d : values + (t - first) * d;
                sum = _mm512_fmadd_ps(_mm512_set1_ps(w[t]), load_floats(from + c, mask), sum);
            }
            _mm512_mask_storeu_ps(out + i * d + c, mask, _mm512_mul_ps(sum, _mm512_set1_ps(1 / total)));
        }
    }
}

/* One query turned to its position and scaled, [2 half]. */
static void turn_query(const struct packed *all, const bf16 *query, const float *cosines, const float *sines, float *to) {
    const long half = all->half;
    const __m512 scale = _mm512_set1_ps(all->scale);
    for (long c = 0; c < half; c += 16) {
        const __mmask16 mask = lanes(half - c);
        const __m512 cosine = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, cosines + c));
        const __m512 sine = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, sines + c));
        const __m512 x = load_floats(query + c, mask), y = load_floats(query + half + c, mask);
        _mm512_mask_storeu_ps(to + c, mask, _mm512_fnmadd_ps(y, sine, _mm512_mul_ps(x, cosine)));
        _mm512_mask_storeu_ps(to + half + c, mask, _mm512_fmadd_ps(x, sine, _mm512_mul_ps(y, cosine)));
    }
}

/* The same query for coded tokens, a column of laid[columns][h]: absorbed into the pairs of its kv head's keys and into
 * their mean, a pair for each frequency, or as it is. */
static void lay_query(const struct packed *all, const float *query, long g, float *laid) {
    const long half = all->half, h = all->h, pairs = all->rk / 2;
    const float *mean = all->key_mean + g * 2 * half;
    if (!all->frequency) {
        for (long c = 0; c < 2 * half; c++) laid[c * h] = query[c];
        return;
    }
    for (long p = 0; p < pairs; p++) {
        const float *pair = all->key_pairs + 2 * (g * pairs + p);
        const float x = query[all->frequency[p]], y = query[half + all->frequency[p]];
        laid[2 * p * h] = x * pair[0] + y * pair[1];
        laid[(2 * p + 1) * h] = y * pair[0] - x * pair[1];
    }
    laid += 2 * pairs * h;
    for (long f = 0; f < half; f++) {
        const float x = query[f], y = query[half + f];
        laid[2 * f * h] = x * mean[f] + y * mean[half + f];
        laid[(2 * f + 1) * h] = y * mean[f] - x * mean[half + f];
    }
}

/* The outputs of the queries of a sequence's kv head: the coded tokens' average through the decoder, and the exact tokens',
 * each by its share of the weight. */
static void unmix(const struct packed *all, long r, long head, const float *averages, const float *shares,
                  const float *exact) {
    const long d = 2 * all->half, some = all->h / all->g, g = head % all->g;
    for (long c = 0; c < d; c += 4) {
        const bf16 *row[4];
        for (long a = 0; a < 4; a++) row[a] = all->value_decoder + (g * d + (c + a < d ? c + a : d - 1)) * r;
        for (long i = head * some; i < (head + 1) * some; i++) {
            __m512 sum[4];
#pragma GCC unroll 4
            for (int a = 0; a < 4; a++) sum[a] = _mm512_setzero_ps();
            for (long k = 0; k < r; k += 16) {
                const __m512 x = _mm512_loadu_ps(averages + i * r + k);
#pragma GCC unroll 4
                for (int a = 0; a < 4; a++) sum[a] = _mm512_fmadd_ps(load_floats(row[a] + k, 0xffff), x, sum[a]);
            }
            for (long a = 0; a < 4 && c + a < d; a++) {
                const float coded = _mm512_reduce_add_ps(sum[a]) + all->value_mean[g * d + c + a];
                all->output[i * d + c + a] = shares[i] * coded + (1 - shares[i]) * exact[i * d + c + a];
            }
        }
    }
}

/* One new token reads the exact tokens and the codes of n older ones. A number of components that is no multiple of 16 is
 * not taken. Returns 0, or 1 if memory is short. */
int mea_read_packed(const struct packed *in) {
    struct reading all = {.h = in->h, .n = in->n, .half = in->half, .rk = in->rk, .groups = in->group_count};
    const long b = in->b, h = all.h, n = all.n, half = all.half, groups = all.groups, d = 2 * half, threads = in->threads;
    const long rebuilt = !in->frequency, some = h / in->g, tokens = in->first + in->recent;
    all.g = rebuilt ? in->g : 1, all.d = rebuilt ? d : 0, all.d4 = round_up(all.d, 4);
    all.code_stride = in->code_stride, all.scale_stride = in->scale_stride;
    all.columns = rebuilt ? d : all.rk + d, all.pairs = all.columns / 2;
    all.whole_rows = round_up(all.d, 16), all.rows = all.whole_rows > 64 ? all.whole_rows : 64;
    all.tiles = tiles_allowed, all.whole = in->key_decoder;
    all.query_rows = (h + (h + 15) / 16 - 1) / ((h + 15) / 16), all.padded_h = round_up(h, all.query_rows);
    struct group *group = all.group = malloc(groups * sizeof *group);
    if (!group) return 1;
    for (long e = 0; e < groups; e++) {
        const long bits = in->groups[2 * e], size = in->groups[2 * e + 1], bytes = size * bits / 8;
        group[e] = (struct group){bits, size, all.r, all.bytes, bytes, all.vectors, (bytes + 15) / 16 * (8 / bits)};
        all.r += size, all.bytes += bytes, all.vectors += group[e].vectors;
    }
    all.padded_pairs = round_up(rebuilt ? all.r / 2 : all.rk / 2, 16);
    all.padded_half = all.tiles && !rebuilt ? round_up(half, 16) : 0;
    const long of_plane = all.padded_half ? all.padded_pairs + all.padded_half : 0;
    long parts = (threads + b - 1) / b, most = (n + 4 * BLOCK - 1) / (4 * BLOCK);
    parts = parts < most ? parts : most;
    const long size = round_up((n + parts - 1) / parts, BLOCK);
    parts = (n + size - 1) / size;
    const long of_part = round_up(h * (16 * all.vectors + 16 * groups + 2), 16), of_queries = all.columns * h;
    struct scratch mine;
    const long of_exact = round_up((some * tokens + d) * 4, 64), of_codes = cut_scratch(&all, 0, &mine);
    const long of_thread = of_exact > of_codes ? of_exact : of_codes;
    char *memory = 0;
    float *partial, *laid, *planes, *turned, *exact, *exact_lse, *averages, *shares;
    char *work;
    for (int counted = 0; counted < 2; counted++) { /* first only how much there is to be had */
        char *at = memory;
        partial = cut(&at, b * parts * of_part * 4);
        laid = cut(&at, b * of_queries * 4);
        planes = cut(&at, 2 * b * h * of_plane * 4);
        turned = cut(&at, b * h * d * 4);
        exact = cut(&at, b * h * d * 4);
        exact_lse = cut(&at, b * h * 4);
        averages = cut(&at, b * h * all.r * 4);
        shares = cut(&at, b * h * 4);
        work = cut(&at, threads * of_thread);
        all.turns = cut(&at, all.pairs * 3 * 4);
        all.places = cut(&at, half * 2 * BLOCK * 4);
        all.place_pairs = cut(&at, 2 * LANES * all.padded_half * 64);
        all.decoder = cut(&at, all.tiles ? 0 : 2 * all.d4 * all.g * all.r);
        all.factors = cut(&at, all.tiles ? 0 : all.g * groups * 3 * all.d4 * 4);
        all.mean = cut(&at, all.g * all.d4 * 4);
        if (!counted && !(memory = aligned_alloc(64, at - memory))) {
            free(group);
            return 1;
        }
    }
    for (long c = 0; c < all.g * all.d4; c++)
        all.mean[c] = c % all.d4 < all.d ? in->key_mean[c / all.d4 * all.d + c % all.d4] : 0;
    for (long p = 0; p < all.pairs; p++) {
        int32_t *turn = all.turns + 3 * p;
        turn[0] = rebuilt ? p : 2 * p, turn[1] = rebuilt ? half + p : 2 * p + 1;
        turn[2] = rebuilt ? p : p < all.rk / 2 ? in->frequency[p] : p - all.rk / 2;
    }
    for (long f = 0; f < half; f++)
        for (long u = 0; u < BLOCK; u += 16) {
            float *to = all.places + 2 * f * BLOCK + u;
            _mm512_storeu_ps(to, _mm512_i32gather_ps(multiples(half), in->place_cosines + u * half + f, 4));
            _mm512_storeu_ps(to + BLOCK, _mm512_i32gather_ps(multiples(half), in->place_sines + u * half + f, 4));
        }
    memset(planes, 0, 2 * b * h * of_plane * 4);
    memset(all.place_pairs, 0, 2 * LANES * all.padded_half * 64);
    for (long i = 0; i < b * h; i++) { /* by one thread: threads that wait for each other take longer than this */
        const long s = i / h, angle = s * in->exact_sequence + (tokens - 1) * half;
        turn_query(in, in->queries + i * d, in->exact_cosines + angle, in->exact_sines + angle, turned + i * d);
        lay_query(in, turned + i * d, i % h / some, laid + s * of_queries + i % h);
        for (long p = 0; p < all.pairs && of_plane; p++) {
            float *to = planes + 2 * i * of_plane + (p < all.rk / 2 ? p : all.padded_pairs + p - all.rk / 2);
            const float *from = laid + s * of_queries + 2 * p * h + i % h;
            to[0] = from[0], to[of_plane] = from[h];
        }
    }
    if (of_plane) lay_places(&all);
#pragma omp parallel num_threads(threads)
    {
        if (rebuilt && !all.tiles)
#pragma omp for schedule(static)
            for (long row = 0; row < all.g * all.d4; row++) /* the decoder is there for all before anyone reads it */
                for (long e = 0; e < groups; e++) {
                    static const bf16 none[LARGEST];
                    const long g = row / all.d4, c = row % all.d4;
                    const bf16 *from = in->key_decoder + (g * all.whole_rows + c) * 2 * all.padded_pairs + group[e].first;
                    int8_t *to = all.decoder + 2 * all.d4 * (g * all.r + group[e].first) + c * group[e].size;
                    lay_decoder(c < all.d ? from : none, group + e, to, to + all.d4 * group[e].size,
                                all.factors + (g * groups + e) * 3 * all.d4 + c, all.d4);
                }
#pragma omp for schedule(static, 1)
        for (long thread = 0; thread < threads; thread++) {
            struct scratch my;
            struct reading own = all;
            char *scratch = work + thread * of_thread;
            const unsigned modes = _mm_getcsr();
            _mm_setcsr(modes | 0x8040); /* tiny numbers are 0: with them each product takes a hundred times as long */
            cut_scratch(&all, scratch, &my);
            for (long task = thread; task < b * parts; task += threads) {
                const long s = task / parts, from = task % parts * size, to = from + size < n ? from + size : n;
                const long angles = s * in->angle_sequence + from / BLOCK * half;
                float *out = partial + task * of_part, *lows = out + h * 16 * all.vectors;
                float *highest = lows + h * groups * 16;
                own.planes = planes + 2 * s * h * of_plane;
                read_part(&own, laid + s * of_queries, in->codes + s * in->code_sequence + from * all.code_stride,
                          in->scales + s * in->scale_sequence + from * all.scale_stride,
                          in->hidden ? in->hidden + s * n + from : 0, in->block_cosines + angles,
                          in->block_sines + angles, to - from, &my, out, lows, highest, highest + h);
            }
            for (long task = thread; task < b * in->g; task += threads) {
                const long i = task * some;
                read_exact(in, task / in->g, task % in->g, some, turned + i * d, (float *)scratch, exact + i * d,
                           exact_lse + i);
            }
#ifdef __AMX_BF16__
            if (all.tiles) _tile_release();
#endif
            _mm_setcsr(modes);
        }
#pragma omp for schedule(static)
        for (long task = 0; task < b * in->g; task++) {
            for (long i = task * some; i < (task + 1) * some; i++) {
                float lse;
                join_parts(&all, partial + i / h * parts * of_part, parts, of_part, i % h, averages + i * all.r, &lse);
                shares[i] = 1 / (1 + expf(exact_lse[i] - lse));
            }
            unmix(in, all.r, task, averages, shares, exact);
        }
    }
    free(memory), free(group);
    return 0;
}

/* buffer [b][g][t][d]: the oldest token goes, a new one comes behind the others. sizes: b, g, t, d, and the token's strides
 * of b and g. */
void mea_push(bf16 *buffer, const bf16 *token, const long *sizes) {
    const long t = sizes[2], d = sizes[3];
    for (long i = 0; i < sizes[0] * sizes[1]; i++, buffer += t * d) {
        memmove(buffer, buffer + d, (t - 1) * d * sizeof *buffer);
        memcpy(buffer + (t - 1) * d, token + i / sizes[1] * sizes[4] + i % sizes[1] * sizes[5], d * sizeof *buffer);
    }
}
