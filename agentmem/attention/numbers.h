/* Vectors of WIDE floats, and the functions that read them from storage of several dtypes and write them. */
#ifndef AGENTMEM_NUMBERS_H
#define AGENTMEM_NUMBERS_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include "decode_piece.h"

/* WIDE, which the includer defines, is the floats of one vector: 16 in a register of AVX-512, 8 of AVX2, 4 of SSE, NEON. */
#define INLINE static inline __attribute__((always_inline))

typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef float loose __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef int32_t wide_int __attribute__((vector_size(4 * WIDE)));
typedef uint32_t wide_bits __attribute__((vector_size(4 * WIDE)));
typedef int8_t sixteen __attribute__((vector_size(16)));
typedef int16_t eight __attribute__((vector_size(16)));
typedef int8_t codes __attribute__((vector_size(WIDE), aligned(1), may_alias));
typedef uint8_t bytes __attribute__((vector_size(WIDE), aligned(1), may_alias));
typedef uint16_t few_bits __attribute__((vector_size(2 * WIDE), aligned(2), may_alias));
typedef uint32_t loose_bits __attribute__((vector_size(4 * WIDE), aligned(2), may_alias));

static const wide none = {0};

INLINE wide load(const float *from) { return *(const loose *)from; }
INLINE void store(float *to, wide x) { *(loose *)to = x; }

INLINE wide choose(wide_int which, wide yes, wide no) {
    return (wide)(((wide_int)yes & which) | ((wide_int)no & ~which));
}

#ifndef __has_builtin
#define __has_builtin(name) 0
#endif
#define SHUFFLES __has_builtin(__builtin_shufflevector)

/* Returns float16 numbers as float32. Sign and magnitude are at their float32 places; a product corrects exponents. */
INLINE wide from_half(wide_bits sign, wide_bits magnitude) {
    wide number = (wide)magnitude * 0x1p112f;
    wide_bits endless = (wide_bits)((wide_int)magnitude >= 0x0f800000) & 0x7f800000; /* infinity and NaN */
    return (wide)((wide_bits)number | endless | sign);
}

/* Returns WIDE numbers in their order; `level` is that of code_for(). */
INLINE wide fetch_one(const int level, const int kind, const char *from, ptrdiff_t at) {
    if (kind == FLOAT32) return load((const float *)from + at);
    const few_bits *narrow = (const few_bits *)(from + 2 * at);
#ifdef __x86_64__
    if (kind == FLOAT16 && level) { /* compilers convert one number at a time */
        wide number;
        __asm__("vcvtph2ps %1, %0" : "=v"(number) : "m"(*narrow));
        return number;
    }
#else
    (void)level;
#endif
    wide_bits bits = __builtin_convertvector(*narrow, wide_bits);
    if (kind == BFLOAT16) return (wide)(bits << 16);
    return from_half(bits << 16 & 0x80000000, bits << 13 & 0x0fffe000);
}

/* Returns the scale of number `at` in a row of `dim` numbers of kind INT8 or INT4. */
INLINE float scale_of(const int kind, const char *row, ptrdiff_t dim, ptrdiff_t at) {
    uint16_t brain;
    uint32_t bits;
    float scale;
    memcpy(&brain, row + (kind == INT8 ? dim : dim / 2) + at / GROUP * 2, 2);
    bits = (uint32_t)brain << 16;
    memcpy(&scale, &bits, 4);
    return scale;
}
/* Returns WIDE numbers of a row of INT8 from `at` on; they are of one group. */
INLINE wide decoded(const int level, const char *row, ptrdiff_t at, float scale) {
    const codes *from = (const codes *)(row + at);
    wide_int number;
#ifdef __x86_64__
    if (level) { /* GCC 12 converts one code at a time */
        __asm__("vpmovsxbd %1, %0" : "=v"(number) : "m"(*from));
        return __builtin_convertvector(number, wide) * scale;
    }
#else
    (void)level;
#endif
#if SHUFFLES && WIDE == 4 /* each code four times, shifted down from the highest byte */
    int32_t all;
    memcpy(&all, from, WIDE);
    sixteen bytes = (sixteen)(wide_int){all};
    bytes = __builtin_shufflevector(bytes, bytes, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    number = (wide_int)__builtin_shufflevector((eight)bytes, (eight)bytes, 0, 8, 1, 9, 2, 10, 3, 11) >> 24;
#else
    number = __builtin_convertvector(*from, wide_int);
#endif
    return __builtin_convertvector(number, wide) * scale;
}

/* Returns WIDE numbers of a row of INT4 from `at` on; they are of one half of a group, so of one half of WIDE bytes. The
 * codes are shifted to the upper four bits of 32, and so are 2^28 times as large. */
INLINE wide decoded_half(const int level, const char *row, ptrdiff_t at, float scale) {
    const bytes *from = (const bytes *)(row + at / GROUP * (GROUP / 2) + at % (GROUP / 2));
    wide_bits pairs;
#ifdef __x86_64__
    if (level) {
        __asm__("vpmovzxbd %1, %0" : "=v"(pairs) : "m"(*from));
    } else
#else
    (void)level;
#endif
        pairs = __builtin_convertvector(*from, wide_bits);
    wide_int codes = (wide_int)(at % GROUP < GROUP / 2 ? pairs << 28 : (pairs & 0xf0) << 24);
    return __builtin_convertvector(codes, wide) * (scale * 0x1p-28f);
}

/* Returns 2 * WIDE numbers of a row of `dim` as two vectors. For bfloat16, these are the numbers with even and with odd
 * indices, which a shift and a mask separate. */
INLINE void fetch(const int level, const int kind, const char *from, ptrdiff_t dim, ptrdiff_t at, wide to[2]) {
    if (kind >= INT8) {
        float scale = scale_of(kind, from, dim, at);
        for (int v = 0; v < 2; v++)
            to[v] = kind == INT8 ? decoded(level, from, at + v * WIDE, scale) : decoded_half(level, from, at + v * WIDE, scale);
        return;
    }
    if (kind != BFLOAT16) {
        to[0] = fetch_one(level, kind, from, at);
        to[1] = fetch_one(level, kind, from, at + WIDE);
        return;
    }
    wide_bits pairs = *(const loose_bits *)(from + 2 * at);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    pairs = pairs << 16 | pairs >> 16;
#endif
    to[0] = (wide)(pairs << 16);
    to[1] = (wide)(pairs & 0xffff0000);
}

INLINE float largest(wide x) {
    float top = x[0];
    for (int i = 1; i < WIDE; i++) top = x[i] > top ? x[i] : top;
    return top;
}

INLINE float sum(wide x) {
    union { wide all; float lane[WIDE]; } u = {x};
    for (int half = WIDE / 2; half; half /= 2)
        for (int i = 0; i < half; i++) u.lane[i] += u.lane[i + half];
    return u.lane[0];
}

#if SHUFFLES
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#if WIDE == 16
#define EVEN 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define ODD 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define LOWER 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define UPPER 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#elif WIDE == 8
#define EVEN 0, 8, 1, 9, 4, 12, 5, 13
#define ODD 2, 10, 3, 11, 6, 14, 7, 15
#define LOWER 0, 1, 8, 9, 4, 5, 12, 13
#define UPPER 2, 3, 10, 11, 6, 7, 14, 15
#else
#define EVEN 0, 4, 1, 5
#define ODD 2, 6, 3, 7
#define LOWER 0, 1, 4, 5
#define UPPER 2, 3, 6, 7
#endif
/* Sums four vectors over lanes, four at a time: lane 4 q + i of the result is the sum of the q-th four lanes of v[i]. */
INLINE wide quarters(const wide v[4]) {
    wide two[2];
    for (int i = 0; i < 2; i++) two[i] = MIX(v[2 * i], v[2 * i + 1], EVEN) + MIX(v[2 * i], v[2 * i + 1], ODD);
    return MIX(two[0], two[1], LOWER) + MIX(two[0], two[1], UPPER);
}

/* Returns the sums of WIDE vectors, given the results of quarters() for each four of them. */
INLINE wide sums(const wide v[WIDE / 4]) {
#if WIDE == 16
    wide two[2];
    for (int i = 0; i < 2; i++)
        two[i] = MIX(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                 MIX(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    return MIX(two[0], two[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           MIX(two[0], two[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif WIDE == 8
    return MIX(v[0], v[1], 0, 1, 2, 3, 8, 9, 10, 11) + MIX(v[0], v[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
    return v[0];
#endif
}
#endif

/* exp(x) for x <= 0 to 1e-7 of the largest weight: 2^m times a polynomial on [-ln2/2, ln2/2] (Cephes expf). */
INLINE wide exponential(wide x) {
    wide y = x * 1.44269504088896341f;
    y = choose(y < -126.0f, none - 126.0f, y);
    wide_int m = __builtin_convertvector(y - 0.5f, wide_int);
    wide f = (y - __builtin_convertvector(m, wide)) * 0.6931471805599453f;
    wide p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    wide_int power = (m + 127) << 23;
    return p * (wide)power;
}

/* Returns a float32 as bfloat16, rounded to nearest, ties to even. */
static inline uint16_t to_brain(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Returns a float32 as float16, rounded likewise. Adding a constant rounds small numbers (F. Giesen's method). */
static inline uint16_t to_half(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (x != x) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);      /* rounds to 2^16 or more */
    if (bits >= 0x38800000) return (uint16_t)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
    float small;
    memcpy(&small, &bits, 4);
    small += 0.5f; /* 2^-1, whose last bit is float16's smallest number, 2^-24 */
    memcpy(&bits, &small, 4);
    return (uint16_t)(sign | (bits - 0x3f000000));
}

/* Converts `dim` numbers to floats, in the order in which fetch() returns numbers of kind `as`. */
INLINE void widen(const int kind, const int as, const char *from, ptrdiff_t dim, float *to) {
    ptrdiff_t i = 0;
    for (wide two[2]; kind == as && i + 2 * WIDE <= dim; i += 2 * WIDE) {
        fetch(0, kind, from, dim, i, two);
        store(to + i, two[0]);
        store(to + i + WIDE, two[1]);
    }
    for (; i < dim; i += WIDE) store(to + i, fetch_one(0, kind, from, i));
}

/* Transforms numbers by a Hadamard matrix, as quantised.transform does: a rotation that is its own inverse. */
INLINE void transform(float *numbers, ptrdiff_t dim) {
    const ptrdiff_t block = dim & -dim;
    for (ptrdiff_t step = 1; step < block; step *= 2)
        for (ptrdiff_t at = 0; at < dim; at += 2 * step)
            for (ptrdiff_t i = at; i < at + step; i++) {
                float first = numbers[i], second = numbers[i + step];
                numbers[i] = first + second;
                numbers[i + step] = first - second;
            }
    const float norm = (float)(1.0 / sqrt((double)block));
    for (ptrdiff_t i = 0; i < dim; i++) numbers[i] *= norm;
}

/* Encodes one group of numbers: its codes, not yet packed, and the bits of its scale; `most` is the largest code. */
static uint16_t encode_group(const float *number, float most, signed char *to) {
    float top = 0.0f, scale;
    uint32_t bits;
    for (int i = 0; i < GROUP; i++) top = fabsf(number[i]) <= top ? top : number[i] != number[i] ? NAN : fabsf(number[i]);
    for (int i = 0; i < GROUP; i++) top = number[i] != number[i] ? NAN : top;
    scale = top / most;
    memcpy(&bits, &scale, 4);
    bits = ((bits & 0x7fffffff) + 0xffff) & 0xffff0000; /* rounded up to the next bfloat16 */
    memcpy(&scale, &bits, 4);
    for (int i = 0; i < GROUP; i++) {
        float code = number[i] / scale;
        to[i] = (signed char)(fabsf(code) <= 128.0f ? nearbyintf(code) : 0.0f);
    }
    return (uint16_t)(bits >> 16);
}

/* Encodes `dim` numbers of another kind as a row of INT8 or INT4, with exactly the bits that quantised.py writes. `work`
 * has room for `dim` floats. */
static void encode(const int kind, const int as, const char *from, ptrdiff_t dim, char *to, float *work) {
    signed char code[GROUP];
    for (ptrdiff_t i = 0; i < dim; i += WIDE) store(work + i, fetch_one(0, kind, from, i));
    if (as == INT4) transform(work, dim);
    for (ptrdiff_t at = 0; at < dim; at += GROUP) {
        uint16_t scale = encode_group(work + at, as == INT8 ? 127.0f : 7.0f, code);
        memcpy(to + (as == INT8 ? dim : dim / 2) + at / GROUP * 2, &scale, 2);
        if (as == INT8) memcpy(to + at, code, GROUP);
        else
            for (int i = 0; i < GROUP / 2; i++)
                to[at / 2 + i] = (char)((code[i] & 15) | (unsigned)code[i + GROUP / 2] << 4);
    }
}

/* Reverses widen(): writes floats that are in the order of kind `as` into storage. */
INLINE void narrow(const int kind, const int as, const float *from, ptrdiff_t dim, char *to) {
    if (kind == FLOAT32) {
        memcpy(to, from, 4 * dim);
        return;
    }
    for (ptrdiff_t i = 0; i < dim; i++) {
        ptrdiff_t block = i - i % (2 * WIDE), place = i;
        if (as == BFLOAT16 && block + 2 * WIDE <= dim) place = block + i % 2 * WIDE + i % (2 * WIDE) / 2;
        uint16_t number = kind == BFLOAT16 ? to_brain(from[place]) : to_half(from[place]);
        memcpy(to + 2 * i, &number, 2);
    }
}
#endif
