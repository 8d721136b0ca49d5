/* What decode.c passes to the code for one instruction set: pieces of heads, and the shape that all pieces share. */
#ifndef AGENTMEM_DECODE_PIECE_H
#define AGENTMEM_DECODE_PIECE_H
#include <stddef.h>

#define WHOLE 16 /* dims are multiples of this number, and so are the slots at which heads are cut */
/* The dtypes of storage. INT8 and INT4 are rows of quantised.py, those of INT4 of numbers transformed by transform(). */
enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };
#define GROUP 32 /* codes of INT8 and INT4 that share a scale */

static inline ptrdiff_t bytes_of(int kind) { return kind == FLOAT32 ? 4 : 2; }

/* Returns the bytes of `dim` consecutive numbers in storage. */
static inline ptrdiff_t row_bytes(int kind, ptrdiff_t dim) {
    if (kind < INT8) return dim * bytes_of(kind);
    return (kind == INT8 ? dim : dim / 2) + dim / GROUP * 2;
}

/* Slots first .. last of one KV head of one sequence, and everything that a thread needs to attend to them. */
typedef struct {
    const char *asked;               /* the head's queries in storage, Shape.apart numbers apart */
    const char *new_key, *new_value; /* what to write to the last slot first; NULL for nothing */
    char *keys, *values;
    const float *bias; /* NULL if no slot has a β */
    char *output;      /* [group, value_dim] of the head, in storage */
    float *work;       /* the queries as widen() orders them, the sums in that order, peaks and masses */
    ptrdiff_t first, last;
    ptrdiff_t of; /* in the first piece of a head: the number of the head's pieces; 0 in the others */
} Piece;

typedef struct {
    ptrdiff_t heads, group, key_dim, value_dim, apart, window;
    float scale;
    int kind, keys, values; /* dtype of queries, fresh keys, fresh values and output; dtypes of the slots */
} Shape;

static inline float *sums_of(const Piece *piece, const Shape *shape) {
    return piece->work + shape->group * shape->key_dim;
}
static inline float *peaks_of(const Piece *piece, const Shape *shape) {
    return sums_of(piece, shape) + shape->group * shape->value_dim;
}
static inline float *masses_of(const Piece *piece, const Shape *shape) { return peaks_of(piece, shape) + shape->group; }
static inline ptrdiff_t work_of(const Shape *shape) { return shape->group * (shape->key_dim + shape->value_dim + 2); }

/* The code for one instruction set; decode_kernel.h describes its functions. */
typedef struct {
    void (*serve)(const Piece *, const Shape *);
    void (*merge)(const Piece *, ptrdiff_t, const Shape *);
} Code;

extern const Code decode_portable, decode_avx2, decode_avx512;
#endif
