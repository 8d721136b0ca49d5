/* Decode steps on the CPU: one token of each of several sequences attends to its slots with β. Sums are float32.
 *
 * torch's fused kernel has one task per head and reads keys as a small matrix product. This code reads keys and values
 * once for all queries of a group, at nearly the speed of a plain sum, and divides the slots of all heads of all
 * sequences between the threads. Softmax is online over tiles of slots (Milakov & Gimelshein, arXiv:1805.02867), and
 * the pieces of a head are merged by their log-masses (Flash-Decoding). -ffast-math is not used, because it would
 * change the rounding of small numbers in the whole process.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "numbers.h"

#define TILE 128 /* slots whose weights are kept at a time */
#define LEAST 256 /* least slots of a share, on average: fewer do not justify another thread */
#define SHARES 2  /* shares per thread, so that other threads can take over a share of a slow thread */

/* Slots first .. last of one KV head of one sequence, and everything that a thread needs to attend to them. */
typedef struct {
    const char *asked;               /* the head's queries in storage, Shape.apart numbers apart */
    const char *new_key, *new_value; /* what to write to the last slot first; NULL for nothing */
    char *keys, *values;
    const float *bias; /* NULL if no slot has a β */
    char *output;      /* [group, value_dim] of the head, in storage */
    float *work;       /* the queries as widen() orders them, the sums in that order, peaks and masses */
    Py_ssize_t first, last;
    Py_ssize_t of; /* in the first piece of a head: the number of the head's pieces; 0 in the others */
} Piece;

typedef struct {
    Py_ssize_t heads, group, key_dim, value_dim, apart, window;
    float scale;
    int kind, slots; /* dtype of queries, fresh keys, fresh values and output; dtype of the slots */
} Shape;

INLINE float *sums_of(const Piece *piece, const Shape *shape) { return piece->work + shape->group * shape->key_dim; }
INLINE float *peaks_of(const Piece *piece, const Shape *shape) {
    return sums_of(piece, shape) + shape->group * shape->value_dim;
}
INLINE float *masses_of(const Piece *piece, const Shape *shape) { return peaks_of(piece, shape) + shape->group; }
static Py_ssize_t work_of(const Shape *shape) { return shape->group * (shape->key_dim + shape->value_dim + 2); }

/* Multiplies the keys of `keys` consecutive slots with `count` queries; the results are not yet summed over lanes. */
INLINE void products(
    const int level, const int kind, const int count, const int slots, const float *queries, const char *keys,
    Py_ssize_t dim, wide to[4][4]
) {
    wide key[2];
    Py_ssize_t i = 0;
    for (int g = 0; g < count; g++)
        for (int j = 0; j < slots; j++) to[g][j] = none;
    for (; i + 2 * WIDE <= dim; i += 2 * WIDE)
        for (int j = 0; j < slots; j++) {
            fetch(level, kind, keys + j * row_bytes(kind, dim), dim, i, key);
            for (int g = 0; g < count; g++)
                for (int v = 0; v < 2; v++) to[g][j] += load(queries + g * dim + i + v * WIDE) * key[v];
        }
    for (int j = 0; i < dim && j < slots; j++) {
        key[0] = fetch_one(level, kind, keys, j * dim + i);
        for (int g = 0; g < count; g++) to[g][j] += load(queries + g * dim + i) * key[0];
    }
}

/* Computes the logits of `count` queries for the n slots of a tile; `const int` arguments are known at compile time. */
INLINE void logits(
    const int level, const int kind, const int count, const float *queries, const char *keys, Py_ssize_t dim,
    Py_ssize_t n, float *to
) {
    wide product[4][4];
    Py_ssize_t j = 0;
#if SHUFFLES
    for (wide part[4][4]; level == 2 && j + WIDE <= n; j += WIDE) {
        for (int four = 0; four < 4; four++) {
            products(level, kind, count, 4, queries, keys + (j + 4 * four) * row_bytes(kind, dim), dim, product);
            for (int g = 0; g < count; g++) part[g][four] = quarters(product[g]);
        }
        for (int g = 0; g < count; g++) store(to + g * TILE + j, sums(part[g]));
    }
#endif
    for (; j < n; j++) {
        products(level, kind, count, 1, queries, keys + j * row_bytes(kind, dim), dim, product);
        for (int g = 0; g < count; g++) to[g * TILE + j] = sum(product[g][0]);
    }
}

/* Adds the n weighted values of a tile to the outputs of `count` queries, two vectors of each at a time. */
INLINE void mix(
    const int level, const int kind, const int count, const int vectors, const float *weights, const char *values,
    Py_ssize_t at, Py_ssize_t dim, Py_ssize_t n, float *to
) {
    wide total[4][2], value[2];
    for (int g = 0; g < count; g++)
        for (int v = 0; v < vectors; v++) total[g][v] = load(to + g * dim + v * WIDE);
    for (Py_ssize_t j = 0; j < n; j++) {
        if (vectors == 2) fetch(level, kind, values + j * row_bytes(kind, dim), dim, at, value);
        else value[0] = fetch_one(level, kind, values, j * dim + at);
        for (int v = 0; v < vectors; v++)
            for (int g = 0; g < count; g++) total[g][v] += weights[g * TILE + j] * value[v];
    }
    for (int g = 0; g < count; g++)
        for (int v = 0; v < vectors; v++) store(to + g * dim + v * WIDE, total[g][v]);
}

/* Prefetches memory that is read next, because the processor itself prefetches only to the end of a page. */
INLINE void expect(const char *from, Py_ssize_t bytes) {
    for (Py_ssize_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

/* Turns one query's n logits into weights. If the largest logit (peak) rises, the sums so far are scaled down. */
INLINE void soften(
    float *row, const float *bias, const Shape *shape, Py_ssize_t n, float *output, float *peak, float *mass
) {
    Py_ssize_t end = n - n % WIDE;
    for (Py_ssize_t j = 0; j < end; j += WIDE)
        store(row + j, load(row + j) * shape->scale + (bias ? load(bias + j) : none));
    for (Py_ssize_t j = end; j < n; j++) row[j] = row[j] * shape->scale + (bias ? bias[j] : 0.0f);
    for (Py_ssize_t j = n; j % WIDE; j++) row[j] = -INFINITY;
    wide tops = none + *peak;
    for (Py_ssize_t j = 0; j < n; j += WIDE) tops = choose(load(row + j) > tops, load(row + j), tops);
    float top = largest(tops);
    if (top == -INFINITY) { /* no logit above -inf so far: weights are 0, or NaN for a NaN logit */
        for (Py_ssize_t j = 0; j < n; j++) *mass += row[j] = row[j] == -INFINITY ? 0.0f : NAN;
        return;
    }
    if (top > *peak) {
        float shrink = expf(*peak - top);
        *mass *= shrink;
        for (Py_ssize_t i = 0; i < shape->value_dim; i++) output[i] *= shrink;
        *peak = top;
    }
    wide total = none;
    for (Py_ssize_t j = 0; j < n; j += WIDE) {
        wide weight = exponential(load(row + j) - top);
        store(row + j, weight);
        total += weight;
    }
    *mass += sum(total);
}

/* Computes a piece for `count` queries from `group` on: sums (not yet divided by the masses), masses and peaks. */
INLINE void some(
    const int level, const int kind, const int count, const Piece *piece, const Shape *shape, Py_ssize_t group
) {
    float row[4 * TILE] __attribute__((aligned(64)));
    const Py_ssize_t width = shape->key_dim, dim = shape->value_dim;
    const Py_ssize_t key = row_bytes(kind, width), value = row_bytes(kind, dim);
    const float *queries = piece->work + group * width;
    float *output = sums_of(piece, shape) + group * dim;
    float *peak = peaks_of(piece, shape) + group, *mass = masses_of(piece, shape) + group;
    for (int g = 0; g < count; g++) {
        peak[g] = -INFINITY;
        mass[g] = 0.0f;
        for (Py_ssize_t i = 0; i < dim; i++) output[g * dim + i] = 0.0f;
    }
    for (Py_ssize_t at = piece->first; at < piece->last; at += TILE) {
        Py_ssize_t n = piece->last - at < TILE ? piece->last - at : TILE;
        const char *keys = piece->keys + at * key, *values = piece->values + at * value;
        expect(values, n * value);
        if (level == 1 && width == 64) logits(level, kind, count, queries, keys, 64, n, row);
        else if (level == 1 && width == 128) logits(level, kind, count, queries, keys, 128, n, row);
        else logits(level, kind, count, queries, keys, width, n, row);
        if (at + n < piece->last) expect(keys + n * key, n * key);
        const float *bias = piece->bias ? piece->bias + at : NULL;
        for (int g = 0; g < count; g++)
            soften(row + g * TILE, bias, shape, n, output + g * dim, peak + g, mass + g);
        Py_ssize_t i = 0;
        for (; i + 2 * WIDE <= dim; i += 2 * WIDE) mix(level, kind, count, 2, row, values, i, dim, n, output + i);
        if (i < dim) mix(level, kind, count, 1, row, values, i, dim, n, output + i);
    }
}

/* Computes a piece for all its queries, at most four at a time. */
INLINE void whole(const int level, const int kind, const Piece *piece, const Shape *shape) {
    Py_ssize_t g = 0;
    for (; g + 4 <= shape->group; g += 4) some(level, kind, 4, piece, shape, g);
    if (shape->group - g == 3) some(level, kind, 3, piece, shape, g);
    if (shape->group - g == 2) some(level, kind, 2, piece, shape, g);
    if (shape->group - g == 1) some(level, kind, 1, piece, shape, g);
}

INLINE void any(const int level, const Piece *piece, const Shape *shape) {
    if (shape->slots == FLOAT32) whole(level, FLOAT32, piece, shape);
    if (shape->slots == BFLOAT16) whole(level, BFLOAT16, piece, shape);
    if (shape->slots == FLOAT16) whole(level, FLOAT16, piece, shape);
    if (shape->slots == INT8) whole(level, INT8, piece, shape);
}

typedef void (*Attend)(const Piece *, const Shape *);
static void portable(const Piece *piece, const Shape *shape) { any(0, piece, shape); }
#ifdef __x86_64__
__attribute__((target("avx2,fma"))) static void avx2(const Piece *piece, const Shape *shape) { any(1, piece, shape); }
__attribute__((target("avx512f,avx512dq,avx512vl,fma"))) static void avx512(const Piece *piece, const Shape *shape) {
    any(2, piece, shape);
}
#endif

/* Returns the code for an instruction set (0 any CPU, 1 AVX2, 2 AVX-512), or NULL if this CPU lacks the set. */
static Attend code_for(int level) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (level == 2 && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return avx512;
    if (level == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2;
#endif
    return level == 0 ? portable : NULL;
}

static Attend attend = portable;

/* Merges the pieces of one head, weighted by their masses, and writes the output; the first piece's sums are reused. */
static void merge(const Piece *pieces, Py_ssize_t count, const Shape *shape) {
    const Py_ssize_t dim = shape->value_dim, size = dim * bytes_of(shape->kind);
    for (Py_ssize_t g = 0; g < shape->group; g++) {
        float top = -INFINITY, total = 0.0f, *sum = sums_of(pieces, shape) + g * dim;
        for (Py_ssize_t p = 0; p < count; p++) top = fmaxf(top, peaks_of(pieces + p, shape)[g]);
        for (Py_ssize_t p = 0; p < count; p++) {
            const float *part = sums_of(pieces + p, shape) + g * dim;
            float share = expf(peaks_of(pieces + p, shape)[g] - top);
            total += share * masses_of(pieces + p, shape)[g];
            for (Py_ssize_t i = 0; i < dim; i++) sum[i] = (p ? sum[i] : 0.0f) + share * part[i];
        }
        for (Py_ssize_t i = 0; i < dim; i++) sum[i] /= total;
        narrow(shape->kind, shape->slots, sum, dim, pieces->output + g * size);
    }
}

/* Does all work of one piece. A new slot is written before it is read, and no other piece reads that slot. */
static void serve(const Piece *piece, const Shape *shape) {
    const Py_ssize_t key = row_bytes(shape->slots, shape->key_dim), value = row_bytes(shape->slots, shape->value_dim);
    const Py_ssize_t apart = shape->apart * bytes_of(shape->kind);
    if (piece->new_key && shape->slots != shape->kind) {
        encode(shape->kind, piece->new_key, shape->key_dim, piece->keys + (piece->last - 1) * key);
        encode(shape->kind, piece->new_value, shape->value_dim, piece->values + (piece->last - 1) * value);
    } else if (piece->new_key) {
        memcpy(piece->keys + (piece->last - 1) * key, piece->new_key, key);
        memcpy(piece->values + (piece->last - 1) * value, piece->new_value, value);
    }
    for (Py_ssize_t g = 0; g < shape->group; g++)
        widen(
            shape->kind, shape->slots, piece->asked + g * apart, shape->key_dim, piece->work + g * shape->key_dim);
    attend(piece, shape);
    if (piece->of == 1) merge(piece, 1, shape);
}

/* Computes all pieces, one share at a time; share s consists of the pieces begins[s] .. begins[s + 1]. */
static void serve_all(
    const Piece *pieces, const Py_ssize_t *begins, Py_ssize_t shares, const Shape *shape, int threads
) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && shares > 1)
    for (Py_ssize_t s = 0; s < shares; s++)
        for (Py_ssize_t p = begins[s]; p < begins[s + 1]; p++) serve(pieces + p, shape);
    for (Py_ssize_t p = 0; p < begins[shares]; p++)
        if (pieces[p].of > 1) merge(pieces + p, pieces[p].of, shape);
}

/* The addresses of the slots of one head, and its capacity in slots. */
typedef struct {
    unsigned long long keys, values, bias, room;
} Head;

/* The address of queries, fresh keys or fresh values, and the strides over sequences and heads, in numbers. */
typedef struct {
    unsigned long long address;
    Py_ssize_t sequence, head;
} Rows;

/* One sequence: its row in the queries, its heads, the filled slots of each head, and whether slots have a β. */
typedef struct {
    Py_ssize_t row;
    const Head *heads;
    PyObject *lengths;
    int biased;
} Sequence;

typedef struct {
    Shape shape;
    Rows queries, keys, values; /* without keys, nothing is appended */
    char *output;
    char *scratch;
    Py_ssize_t rows, size; /* sequences that the queries have; bytes of the scratch */
    int threads;
    PyObject *sequences;
} Step;

static Py_ssize_t most_pieces(Py_ssize_t sequences, Py_ssize_t heads, int threads) {
    return sequences * heads + SHARES * (Py_ssize_t)threads;
}

static Py_ssize_t scratch_bytes(Py_ssize_t sequences, const Shape *shape, int threads) {
    size_t piece = sizeof(Piece) + work_of(shape) * sizeof(float);
    size_t begins = (SHARES * (size_t)threads + 1) * sizeof(Py_ssize_t);
    return most_pieces(sequences, shape->heads, threads) * piece + begins;
}

static int read_sequence(PyObject *item, const Step *step, Sequence *to) {
    PyObject *layout, *heads;
    if (!PyArg_ParseTuple(
            item, "nO!O!p;a sequence", &to->row, &PyTuple_Type, &layout, &PyList_Type, &to->lengths, &to->biased))
        return 0;
    heads = PyTuple_GET_SIZE(layout) ? PyTuple_GET_ITEM(layout, 0) : NULL;
    if (!heads || !PyBytes_Check(heads) || PyBytes_GET_SIZE(heads) != step->shape.heads * (Py_ssize_t)sizeof(Head) ||
        PyList_GET_SIZE(to->lengths) != step->shape.heads || to->row < 0 || to->row >= step->rows) {
        PyErr_SetString(PyExc_ValueError, "a sequence has another number of heads, or a row that the queries lack");
        return 0;
    }
    to->heads = (const Head *)(const void *)PyBytes_AS_STRING(heads);
    return 1;
}

/* Returns the slots of a head, including a new slot; -1 if a new slot has no room, or if there are no slots. */
static Py_ssize_t filled(const Step *step, const Sequence *sequence, Py_ssize_t head) {
    Py_ssize_t count = PyLong_AsSsize_t(PyList_GET_ITEM(sequence->lengths, head));
    if (count == -1 && PyErr_Occurred()) return -1;
    count += step->keys.address != 0;
    if (count >= 1 && (unsigned long long)count <= sequence->heads[head].room) return count;
    PyErr_SetString(PyExc_ValueError, "a head has no slots, or more than it has room for");
    return -1;
}

static Py_ssize_t first_seen(const Shape *shape, Py_ssize_t count) {
    return shape->window && count > shape->window ? count - shape->window : 0;
}

/* Checks every sequence; returns the number of slots that all heads together attend to, or -1. */
static Py_ssize_t all_slots(const Step *step) {
    Py_ssize_t total = 0;
    for (Py_ssize_t s = 0; s < PyList_GET_SIZE(step->sequences); s++) {
        Sequence sequence;
        if (!read_sequence(PyList_GET_ITEM(step->sequences, s), step, &sequence)) return -1;
        for (Py_ssize_t head = 0; head < step->shape.heads; head++) {
            Py_ssize_t count = filled(step, &sequence, head);
            if (count < 0) return -1;
            total += count - first_seen(&step->shape, count);
        }
    }
    return total;
}

static const char *row_of(const Rows *rows, const Shape *shape, Py_ssize_t sequence, Py_ssize_t head) {
    Py_ssize_t place = sequence * rows->sequence + head * rows->head;
    return (const char *)(uintptr_t)rows->address + place * bytes_of(shape->kind);
}

/* Returns one head as a single piece, before it is cut. */
static Piece head_of(const Step *step, const Sequence *sequence, Py_ssize_t head) {
    const Shape *shape = &step->shape;
    const Head *at = sequence->heads + head;
    const Py_ssize_t place = (sequence->row * shape->heads + head) * shape->group * shape->value_dim;
    const Py_ssize_t count = filled(step, sequence, head), fresh = step->keys.address != 0;
    return (Piece){
        .asked = row_of(&step->queries, shape, sequence->row, head * shape->group),
        .new_key = fresh ? row_of(&step->keys, shape, sequence->row, head) : NULL,
        .new_value = fresh ? row_of(&step->values, shape, sequence->row, head) : NULL,
        .keys = (char *)(uintptr_t)at->keys,
        .values = (char *)(uintptr_t)at->values,
        .bias = sequence->biased && at->bias ? (const float *)(uintptr_t)at->bias : NULL,
        .output = step->output + place * bytes_of(shape->kind),
        .first = first_seen(shape, count),
        .last = count,
    };
}

/* The state of cutting: the slots of all heads in sequence are cut into shares of about `share` slots each. Cuts within
 * a head are at multiples of WIDE slots. */
typedef struct {
    Piece *pieces;
    Py_ssize_t *begins;
    float *work;
    Py_ssize_t count, shares; /* pieces so far, shares that have begun */
    Py_ssize_t share, left;   /* slots of a share; slots that the last share still lacks */
} Cut;

static void cut_head(Cut *cut, Piece rest, const Shape *shape) {
    Piece *first = cut->pieces + cut->count;
    first->of = 0;
    for (Py_ssize_t of = 1, next; rest.first < rest.last; rest.first = next, of++) {
        if (cut->left <= 0) {
            cut->begins[cut->shares++] = cut->count;
            cut->left = cut->share;
        }
        next = rest.first + (cut->left + WIDE - 1) / WIDE * WIDE;
        if (next > rest.last) next = rest.last;
        Piece *piece = cut->pieces + cut->count++;
        *piece = rest;
        piece->last = next;
        if (next < rest.last) piece->new_key = piece->new_value = NULL;
        piece->work = cut->work;
        cut->work += work_of(shape);
        cut->left -= next - rest.first;
        first->of = of;
    }
}

/* Cuts all heads into pieces, and the pieces into shares. */
static Cut cut_all(const Step *step, Py_ssize_t total) {
    Py_ssize_t most = most_pieces(PyList_GET_SIZE(step->sequences), step->shape.heads, step->threads);
    Py_ssize_t shares = step->threads > 1 ? total / LEAST : 1;
    if (shares > SHARES * (Py_ssize_t)step->threads) shares = SHARES * (Py_ssize_t)step->threads;
    if (shares < 1) shares = 1;
    Cut cut = {.pieces = (Piece *)(void *)step->scratch, .share = (total + shares - 1) / shares};
    cut.begins = (Py_ssize_t *)(void *)(cut.pieces + most);
    cut.work = (float *)(void *)(cut.begins + SHARES * (Py_ssize_t)step->threads + 1);
    for (Py_ssize_t s = 0; s < PyList_GET_SIZE(step->sequences); s++) {
        Sequence sequence;
        read_sequence(PyList_GET_ITEM(step->sequences, s), step, &sequence); /* as all_slots() has done */
        for (Py_ssize_t head = 0; head < step->shape.heads; head++)
            cut_head(&cut, head_of(step, &sequence, head), &step->shape);
    }
    cut.begins[cut.shares] = cut.count;
    return cut;
}

static int sound(const Step *step) {
    const Shape *shape = &step->shape;
    if (shape->slots == INT8 && (shape->key_dim % GROUP || shape->value_dim % GROUP)) {
        PyErr_SetString(PyExc_ValueError, "dims of quantised slots that are no whole groups");
        return 0;
    }
    if (shape->kind < FLOAT32 || shape->kind > FLOAT16 || (shape->slots != shape->kind && shape->slots != INT8) || shape->heads < 1 || shape->group < 1 || step->threads < 1 ||
        shape->key_dim < WIDE || shape->key_dim % WIDE || shape->value_dim < WIDE || shape->value_dim % WIDE || shape->window < 0) {
        PyErr_SetString(PyExc_ValueError, "a dtype, dims, heads, threads or a window that this code is not made for");
        return 0;
    }
    if (step->size < scratch_bytes(PyList_GET_SIZE(step->sequences), shape, step->threads)) {
        PyErr_SetString(PyExc_ValueError, "the scratch is smaller than scratch_bytes says");
        return 0;
    }
    return 1;
}

static PyObject *py_attend(PyObject *Py_UNUSED(module), PyObject *arguments) {
    Step step = {0};
    Shape *shape = &step.shape;
    unsigned long long output, scratch;
    if (!PyArg_ParseTuple(
            arguments, "iiifnnnnnnK(nn)K(nn)K(nn)KKnO!", &shape->kind, &shape->slots, &step.threads, &shape->scale, &shape->window,
            &step.rows, &shape->heads, &shape->group, &shape->key_dim, &shape->value_dim, &step.queries.address,
            &step.queries.sequence, &step.queries.head, &step.keys.address, &step.keys.sequence, &step.keys.head,
            &step.values.address, &step.values.sequence, &step.values.head, &output, &scratch, &step.size,
            &PyList_Type, &step.sequences))
        return NULL;
    step.output = (char *)(uintptr_t)output;
    step.scratch = (char *)(uintptr_t)scratch;
    shape->apart = step.queries.head;
    if (!sound(&step)) return NULL;
    Py_ssize_t total = all_slots(&step);
    if (total < 0) return NULL;
    Cut cut = cut_all(&step, total);
    Py_BEGIN_ALLOW_THREADS
    serve_all(cut.pieces, cut.begins, cut.shares, shape, step.threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_scratch_bytes(PyObject *Py_UNUSED(module), PyObject *arguments) {
    Py_ssize_t sequences;
    Shape shape = {0};
    int threads;
    if (!PyArg_ParseTuple(
            arguments, "nnnnni", &sequences, &shape.heads, &shape.group, &shape.key_dim, &shape.value_dim, &threads))
        return NULL;
    return PyLong_FromSsize_t(scratch_bytes(sequences, &shape, threads));
}

static PyObject *py_use(PyObject *Py_UNUSED(module), PyObject *arguments) {
    int level;
    if (!PyArg_ParseTuple(arguments, "i", &level)) return NULL;
    Attend code = code_for(level);
    if (!code) Py_RETURN_FALSE;
    attend = code;
    Py_RETURN_TRUE;
}

static PyMethodDef methods[] = {
    {"attend", py_attend, METH_VARARGS, "One token of each of several sequences; see _decode.pyi."},
    {"scratch_bytes", py_scratch_bytes, METH_VARARGS, "Bytes of scratch that attend() needs; see _decode.pyi."},
    {"use", py_use, METH_VARARGS, "Which instructions: 0 any CPU's, 1 AVX2, 2 AVX-512; whether this CPU has them."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_decode", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__decode(void) {
    for (int level = 2; !(attend = code_for(level));) level--;
    return PyModule_Create(&module);
}
