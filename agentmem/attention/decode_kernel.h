/* Attention of the queries of one head over a piece of the head's slots, for one instruction set.
 *
 * The file that includes this one defines WIDE (floats of a vector), LEVEL (the instruction set, as decode.c numbers
 * them), TARGET (the attribute of functions that are called from outside) and CODE (the name of the result). A vector
 * must be one register, because compilers keep wider vectors in memory. -ffast-math is not used, because it would
 * change the rounding of small numbers in the whole process.
 */
#include "numbers.h"

#define TILE 128 /* slots whose weights are kept at a time */
#define SUMS 12  /* vectors that are summed at a time: more do not stay in 16 registers */

/* Multiplies `slots` consecutive keys with `count` queries; to[g][at + j] is not yet summed over lanes. */
INLINE void products(
    const int kind, const int count, const int slots, const float *queries, const char *keys, ptrdiff_t dim,
    const int at, wide to[4][4]
) {
    wide key[2];
    ptrdiff_t i = 0;
    for (int g = 0; g < count; g++)
        for (int j = at; j < at + slots; j++) to[g][j] = none;
    for (; i + 2 * WIDE <= dim; i += 2 * WIDE)
        for (int j = 0; j < slots; j++) {
            fetch(LEVEL, kind, keys + j * row_bytes(kind, dim), dim, i, key);
            for (int g = 0; g < count; g++)
                for (int v = 0; v < 2; v++) to[g][at + j] += load(queries + g * dim + i + v * WIDE) * key[v];
        }
    for (int j = 0; i < dim && j < slots; j++) {
        key[0] = fetch_one(LEVEL, kind, keys, j * dim + i);
        for (int g = 0; g < count; g++) to[g][at + j] += load(queries + g * dim + i) * key[0];
    }
}

/* Computes the logits of `count` queries for the n slots of a tile; `const int` arguments are known at compile time. */
INLINE void logits(
    const int kind, const int count, const float *queries, const char *keys, ptrdiff_t dim, ptrdiff_t n, float *to
) {
    const ptrdiff_t row = row_bytes(kind, dim);
    wide product[4][4];
    ptrdiff_t j = 0;
#if SHUFFLES
    const int together = WIDE == 16 || 4 * count <= SUMS ? 4 : 2;
    for (wide part[4][WIDE / 4]; j + WIDE <= n; j += WIDE) {
        for (int four = 0; four < WIDE / 4; four++) {
            const char *from = keys + (j + 4 * four) * row;
            for (int at = 0; at < 4; at += together)
                products(kind, count, together, queries, from + at * row, dim, at, product);
            for (int g = 0; g < count; g++) part[g][four] = quarters(product[g]);
        }
        for (int g = 0; g < count; g++) store(to + g * TILE + j, sums(part[g]));
    }
#endif
    for (; j < n; j++) {
        products(kind, count, 1, queries, keys + j * row, dim, 0, product);
        for (int g = 0; g < count; g++) to[g * TILE + j] = sum(product[g][0]);
    }
}

/* Adds the n weighted values of a tile to the outputs of `count` queries, two vectors of each at a time. */
INLINE void mix(
    const int kind, const int count, const int vectors, const float *weights, const char *values, ptrdiff_t at,
    ptrdiff_t dim, ptrdiff_t n, float *to
) {
    wide total[4][2], value[2];
    for (int g = 0; g < count; g++)
        for (int v = 0; v < vectors; v++) total[g][v] = load(to + g * dim + v * WIDE);
    for (ptrdiff_t j = 0; j < n; j++) {
        if (vectors == 2) fetch(LEVEL, kind, values + j * row_bytes(kind, dim), dim, at, value);
        else value[0] = fetch_one(LEVEL, kind, values, j * dim + at);
        for (int v = 0; v < vectors; v++)
            for (int g = 0; g < count; g++) total[g][v] += weights[g * TILE + j] * value[v];
    }
    for (int g = 0; g < count; g++)
        for (int v = 0; v < vectors; v++) store(to + g * dim + v * WIDE, total[g][v]);
}

/* Prefetches memory that is read next, because the processor itself prefetches only to the end of a page. */
INLINE void expect(const char *from, ptrdiff_t bytes) {
    for (ptrdiff_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

/* Turns one query's n logits into weights. If the largest logit (peak) rises, the sums so far are scaled down. */
INLINE void soften(
    float *row, const float *bias, const Shape *shape, ptrdiff_t n, float *output, float *peak, float *mass
) {
    ptrdiff_t end = n - n % WIDE;
    for (ptrdiff_t j = 0; j < end; j += WIDE)
        store(row + j, load(row + j) * shape->scale + (bias ? load(bias + j) : none));
    for (ptrdiff_t j = end; j < n; j++) row[j] = row[j] * shape->scale + (bias ? bias[j] : 0.0f);
    for (ptrdiff_t j = n; j % WIDE; j++) row[j] = -INFINITY;
    wide tops = none + *peak;
    for (ptrdiff_t j = 0; j < n; j += WIDE) tops = choose(load(row + j) > tops, load(row + j), tops);
    float top = largest(tops);
    if (top == -INFINITY) { /* no logit above -inf so far: weights are 0, or NaN for a NaN logit */
        for (ptrdiff_t j = 0; j < n; j++) *mass += row[j] = row[j] == -INFINITY ? 0.0f : NAN;
        return;
    }
    if (top > *peak) {
        float shrink = expf(*peak - top);
        *mass *= shrink;
        for (ptrdiff_t i = 0; i < shape->value_dim; i += WIDE) store(output + i, load(output + i) * shrink);
        *peak = top;
    }
    wide total = none;
    for (ptrdiff_t j = 0; j < n; j += WIDE) {
        wide weight = exponential(load(row + j) - top);
        store(row + j, weight);
        total += weight;
    }
    *mass += sum(total);
}

/* Computes a piece for `count` queries from `group` on: sums (not yet divided by the masses), masses and peaks. */
INLINE void some(
    const int keyed, const int valued, const int count, const Piece *piece, const Shape *shape, ptrdiff_t group
) {
    float row[4 * TILE] __attribute__((aligned(64)));
    const ptrdiff_t width = shape->key_dim, dim = shape->value_dim;
    const ptrdiff_t key = row_bytes(keyed, width), value = row_bytes(valued, dim);
    const float *queries = piece->work + group * width;
    float *output = sums_of(piece, shape) + group * dim;
    float *peak = peaks_of(piece, shape) + group, *mass = masses_of(piece, shape) + group;
    for (int g = 0; g < count; g++) {
        peak[g] = -INFINITY;
        mass[g] = 0.0f;
        for (ptrdiff_t i = 0; i < dim; i += WIDE) store(output + g * dim + i, none);
    }
    for (ptrdiff_t at = piece->first; at < piece->last; at += TILE) {
        ptrdiff_t n = piece->last - at < TILE ? piece->last - at : TILE;
        const char *keys = piece->keys + at * key, *values = piece->values + at * value;
        expect(values, n * value);
        logits(keyed, count, queries, keys, width, n, row);
        if (at + n < piece->last) expect(keys + n * key, n * key);
        const float *bias = piece->bias ? piece->bias + at : NULL;
        for (int g = 0; g < count; g++)
            soften(row + g * TILE, bias, shape, n, output + g * dim, peak + g, mass + g);
        ptrdiff_t i = 0;
        for (; i + 2 * WIDE <= dim; i += 2 * WIDE) mix(valued, count, 2, row, values, i, dim, n, output + i);
        if (i < dim) mix(valued, count, 1, row, values, i, dim, n, output + i);
    }
}

/* Computes a piece for all its queries, at most four at a time. */
INLINE void whole(const int keyed, const int valued, const Piece *piece, const Shape *shape) {
    ptrdiff_t g = 0;
    for (; g + 4 <= shape->group; g += 4) some(keyed, valued, 4, piece, shape, g);
    if (shape->group - g == 3) some(keyed, valued, 3, piece, shape, g);
    if (shape->group - g == 2) some(keyed, valued, 2, piece, shape, g);
    if (shape->group - g == 1) some(keyed, valued, 1, piece, shape, g);
}

/* Merges the pieces of one head, weighted by their masses, and writes the output; the first piece's sums are reused. */
TARGET static void merge(const Piece *pieces, ptrdiff_t count, const Shape *shape) {
    const ptrdiff_t dim = shape->value_dim, size = dim * bytes_of(shape->kind);
    for (ptrdiff_t g = 0; g < shape->group; g++) {
        float top = -INFINITY, total = 0.0f, *sum = sums_of(pieces, shape) + g * dim;
        for (ptrdiff_t p = 0; p < count; p++) top = fmaxf(top, peaks_of(pieces + p, shape)[g]);
        for (ptrdiff_t p = 0; p < count; p++) {
            const float *part = sums_of(pieces + p, shape) + g * dim;
            float share = expf(peaks_of(pieces + p, shape)[g] - top);
            total += share * masses_of(pieces + p, shape)[g];
            for (ptrdiff_t i = 0; i < dim; i += WIDE)
                store(sum + i, (p ? load(sum + i) : none) + share * load(part + i));
        }
        for (ptrdiff_t i = 0; i < dim; i += WIDE) store(sum + i, load(sum + i) / total);
        if (shape->values == INT4) transform(sum, dim);
        narrow(shape->kind, shape->values, sum, dim, pieces->output + g * size);
    }
}

/* Does all work of one piece. A new slot is written before it is read, and no other piece reads that slot. */
TARGET static void serve(const Piece *piece, const Shape *shape) {
    const ptrdiff_t key = row_bytes(shape->keys, shape->key_dim), value = row_bytes(shape->values, shape->value_dim);
    const ptrdiff_t apart = shape->apart * bytes_of(shape->kind);
    if (piece->new_key && shape->keys != shape->kind) {
        char *slot = piece->values + (piece->last - 1) * value;
        encode(shape->kind, shape->keys, piece->new_key, shape->key_dim, piece->keys + (piece->last - 1) * key, piece->work);
        encode(shape->kind, shape->values, piece->new_value, shape->value_dim, slot, piece->work);
    } else if (piece->new_key) {
        memcpy(piece->keys + (piece->last - 1) * key, piece->new_key, key);
        memcpy(piece->values + (piece->last - 1) * value, piece->new_value, value);
    }
    for (ptrdiff_t g = 0; g < shape->group; g++) {
        float *query = piece->work + g * shape->key_dim;
        widen(shape->kind, shape->keys, piece->asked + g * apart, shape->key_dim, query);
        if (shape->keys == INT4) transform(query, shape->key_dim);
    }
    if (shape->keys == FLOAT32) whole(FLOAT32, FLOAT32, piece, shape);
    if (shape->keys == BFLOAT16) whole(BFLOAT16, BFLOAT16, piece, shape);
    if (shape->keys == FLOAT16) whole(FLOAT16, FLOAT16, piece, shape);
    if (shape->keys == INT8 && shape->values == INT8) whole(INT8, INT8, piece, shape);
    if (shape->keys == INT8 && shape->values == INT4) whole(INT8, INT4, piece, shape);
    if (shape->keys == INT4) whole(INT4, INT4, piece, shape);
    if (piece->of == 1) merge(piece, 1, shape);
}

const Code CODE = {serve, merge};
