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

#define BLOCK 64            /* tokens: a block of K or V of width 256 takes 32 KiB */
#define PAIRS (BLOCK / 2)
#define NONE -1e30f         /* the score of a token that is not there */

typedef uint16_t bf16;

static long round_up(long n, long step) { return (n + step - 1) / step * step; }

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
    const float before = expf(*highest - now);
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
            const __mmask16 mask = rv - c >= 16 ? 0xffff : (__mmask16)((1u << (rv - c)) - 1);
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
                                         rv - c >= 16 ? 0xffff : (__mmask16)((1u << (rv - c)) - 1),
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
                const __mmask16 mask = half - c >= 16 ? 0xffff : (__mmask16)((1u << (half - c)) - 1);
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

/* low + code * step of blocks of tokens, to bf16. codes [b, g, n, block, bytes] are contiguous. `step` and `low`, in half
 * precision, hold a number for each channel of a block, or, if `group` is not 0, for each `group` channels (a multiple of
 * 16) of a token. Strides of out are those of sequence, head and token. */
void mea_decode(const uint8_t *codes, const uint16_t *step, const uint16_t *low, bf16 *out, const long *sizes,
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
                s = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, step + task * width + c));
                l = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, low + task * width + c));
            }
            for (long t = 0; t < block; t++) {
                if (group) {
                    const long place = (task * block + t) * (width / group) + c / group;
                    s = _mm512_cvtph_ps(_mm256_set1_epi16((short)step[place]));
                    l = _mm512_cvtph_ps(_mm256_set1_epi16((short)low[place]));
                }
                const __m512 x = _mm512_fmadd_ps(codes16(from + t * bytes + c * bits / 8, bits, rest), s, l);
                _mm256_mask_storeu_epi16(to + t * strides[2] + c, mask, (__m256i)_mm512_cvtneps_pbh(x));
            }
        }
    }
}
