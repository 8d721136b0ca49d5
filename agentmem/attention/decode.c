/* One decode step: a few queries of each KV head over that head's slots with β, on CPU; float32 sums for every dtype.
 *
 * torch's fused kernel has one task a head and reads keys as a small matrix product; this one reads keys and values
 * once for all queries of a group, at nearly the speed of a plain sum, and shares every head out between the threads.
 * Softmax is online over tiles of slots (Milakov & Gimelshein, arXiv:1805.02867), and the pieces of a head are merged
 * by their log-masses (Flash-Decoding). No -ffast-math: it would change the whole process's rounding of small numbers.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "numbers.h"

#define TILE 128 /* slots whose weights are kept at a time */

/* Slots first .. last of one KV head, its queries, and where the unfinished answer goes. */
typedef struct {
    const float *queries; /* as widen() orders them, and so is the answer until narrow() */
    const char *keys, *values;
    const float *bias; /* NULL while no slot carries a β */
    Py_ssize_t first, last, head;
} Piece;

typedef struct {
    Py_ssize_t group, key_dim, value_dim;
    float scale;
    int kind;
} Shape;

/* Products of `keys` slots, one behind the other, with `count` queries, not yet summed over the lanes. */
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
            fetch(level, kind, keys, j * dim + i, key);
            for (int g = 0; g < count; g++)
                for (int v = 0; v < 2; v++) to[g][j] += load(queries + g * dim + i + v * WIDE) * key[v];
        }
    for (int j = 0; i < dim && j < slots; j++) {
        key[0] = fetch_one(level, kind, keys, j * dim + i);
        for (int g = 0; g < count; g++) to[g][j] += load(queries + g * dim + i) * key[0];
    }
}

/* Logits of `count` queries over the n slots of a tile; what is `const int` is known to the compiler. */
INLINE void logits(
    const int level, const int kind, const int count, const float *queries, const char *keys, Py_ssize_t dim,
    Py_ssize_t n, float *to
) {
    wide product[4][4];
    Py_ssize_t j = 0;
#if SHUFFLES
    for (wide part[4][4]; level == 2 && j + WIDE <= n; j += WIDE) {
        for (int four = 0; four < 4; four++) {
            products(level, kind, count, 4, queries, keys + (j + 4 * four) * dim * bytes_of(kind), dim, product);
            for (int g = 0; g < count; g++) part[g][four] = quarters(product[g]);
        }
        for (int g = 0; g < count; g++) store(to + g * TILE + j, sums(part[g]));
    }
#endif
    for (; j < n; j++) {
        products(level, kind, count, 1, queries, keys + j * dim * bytes_of(kind), dim, product);
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
        if (vectors == 2) fetch(level, kind, values, j * dim + at, value);
        else value[0] = fetch_one(level, kind, values, j * dim + at);
        for (int v = 0; v < vectors; v++)
            for (int g = 0; g < count; g++) total[g][v] += weights[g * TILE + j] * value[v];
    }
    for (int g = 0; g < count; g++)
        for (int v = 0; v < vectors; v++) store(to + g * dim + v * WIDE, total[g][v]);
}

/* Asks for memory that is read next: the processor follows a stream only to the end of its page. */
INLINE void expect(const char *from, Py_ssize_t bytes) {
    for (Py_ssize_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

/* Turns one query's n logits into weights; the peak may rise, and what was summed so far shrinks then. */
INLINE void soften(float *row, const float *bias, Shape shape, Py_ssize_t n, float *output, float *peak, float *mass) {
    Py_ssize_t end = n - n % WIDE;
    for (Py_ssize_t j = 0; j < end; j += WIDE)
        store(row + j, load(row + j) * shape.scale + (bias ? load(bias + j) : none));
    for (Py_ssize_t j = end; j < n; j++) row[j] = row[j] * shape.scale + (bias ? bias[j] : 0.0f);
    for (Py_ssize_t j = n; j % WIDE; j++) row[j] = -INFINITY;
    wide tops = none + *peak;
    for (Py_ssize_t j = 0; j < n; j += WIDE) tops = choose(load(row + j) > tops, load(row + j), tops);
    float top = largest(tops);
    if (top == -INFINITY) { /* nothing to see so far: no weight, unless it is no number */
        for (Py_ssize_t j = 0; j < n; j++) *mass += row[j] = row[j] == -INFINITY ? 0.0f : NAN;
        return;
    }
    if (top > *peak) {
        float shrink = expf(*peak - top);
        *mass *= shrink;
        for (Py_ssize_t i = 0; i < shape.value_dim; i++) output[i] *= shrink;
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

/* A piece for `count` queries from `group` on: output [count, value_dim] unnormalised, and [count] peaks and masses. */
INLINE void some(
    const int level, const int kind, const int count, Piece piece, Shape shape, Py_ssize_t group, float *output, float *peak, float *mass
) {
    float row[4 * TILE] __attribute__((aligned(64)));
    const float *queries = piece.queries + group * shape.key_dim;
    const Py_ssize_t dim = shape.value_dim, slot = bytes_of(kind);
    for (int g = 0; g < count; g++) {
        peak[g] = -INFINITY;
        mass[g] = 0.0f;
        for (Py_ssize_t i = 0; i < dim; i++) output[g * dim + i] = 0.0f;
    }
    for (Py_ssize_t at = piece.first; at < piece.last; at += TILE) {
        Py_ssize_t n = piece.last - at < TILE ? piece.last - at : TILE;
        const char *keys = piece.keys + at * shape.key_dim * slot, *values = piece.values + at * dim * slot;
        expect(values, n * dim * slot);
        if (level == 1 && shape.key_dim == 64) logits(level, kind, count, queries, keys, 64, n, row);
        else if (level == 1 && shape.key_dim == 128) logits(level, kind, count, queries, keys, 128, n, row);
        else logits(level, kind, count, queries, keys, shape.key_dim, n, row);
        if (at + n < piece.last) expect(keys + n * shape.key_dim * slot, n * shape.key_dim * slot);
        for (int g = 0; g < count; g++)
            soften(row + g * TILE, piece.bias ? piece.bias + at : NULL, shape, n, output + g * dim, peak + g, mass + g);
        Py_ssize_t i = 0;
        for (; i + 2 * WIDE <= dim; i += 2 * WIDE) mix(level, kind, count, 2, row, values, i, dim, n, output + i);
        if (i < dim) mix(level, kind, count, 1, row, values, i, dim, n, output + i);
    }
}

/* All queries of a piece, at most four at a time. */
INLINE void whole(const int level, const int kind, Piece p, Shape s, float *output, float *peak, float *mass) {
    Py_ssize_t g = 0;
    for (; g + 4 <= s.group; g += 4) some(level, kind, 4, p, s, g, output + g * s.value_dim, peak + g, mass + g);
    output += g * s.value_dim, peak += g, mass += g;
    if (s.group - g == 3) some(level, kind, 3, p, s, g, output, peak, mass);
    if (s.group - g == 2) some(level, kind, 2, p, s, g, output, peak, mass);
    if (s.group - g == 1) some(level, kind, 1, p, s, g, output, peak, mass);
}

INLINE void any(const int level, Piece p, Shape s, float *output, float *peak, float *mass) {
    if (s.kind == FLOAT32) whole(level, FLOAT32, p, s, output, peak, mass);
    if (s.kind == BFLOAT16) whole(level, BFLOAT16, p, s, output, peak, mass);
    if (s.kind == FLOAT16) whole(level, FLOAT16, p, s, output, peak, mass);
}

typedef void (*Attend)(Piece, Shape, float *, float *, float *);
static void portable(Piece p, Shape s, float *output, float *peak, float *mass) { any(0, p, s, output, peak, mass); }
#ifdef __x86_64__
__attribute__((target("avx2,fma"))) static void avx2(Piece p, Shape s, float *output, float *peak, float *mass) {
    any(1, p, s, output, peak, mass);
}
__attribute__((target("avx512f,avx512dq,avx512vl,fma"))) static void avx512(
    Piece p, Shape s, float *output, float *peak, float *mass
) {
    any(2, p, s, output, peak, mass);
}
#endif

/* The code for a set of instructions: 0 any, 1 AVX2, 2 AVX-512; NULL if this CPU lacks it. */
static Attend code_for(int level) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (level == 2 && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return avx512;
    if (level == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2;
#endif
    return level == 0 ? portable : NULL;
}

static Attend attend = portable;

/* One head's answer out of its pieces, each of which counts by its mass; it is summed up in the first one's place. */
static void merge(
    const Piece *pieces, Py_ssize_t count, Shape shape, float *parts, const float *peaks, const float *masses,
    char *output
) {
    const Py_ssize_t dim = shape.value_dim, stride = shape.group * dim;
    for (Py_ssize_t g = 0; g < shape.group; g++) {
        float top = -INFINITY, total = 0.0f, *sum = parts + g * dim;
        for (Py_ssize_t p = 0; p < count; p++) top = fmaxf(top, peaks[p * shape.group + g]);
        for (Py_ssize_t p = 0; p < count; p++) {
            Py_ssize_t at = p * shape.group + g;
            float share = expf(peaks[at] - top);
            total += share * masses[at];
            for (Py_ssize_t i = 0; i < dim; i++) sum[i] = (p ? sum[i] : 0.0f) + share * sum[p * stride + i];
        }
        for (Py_ssize_t i = 0; i < dim; i++) sum[i] /= total;
        narrow(shape.kind, sum, dim, output + (pieces->head * shape.group + g) * dim * bytes_of(shape.kind));
    }
}

static void widen_all(const char *queries, Py_ssize_t count, Shape shape, float *to) {
    for (Py_ssize_t q = 0; q < count; q++)
        widen(shape.kind, queries + q * shape.key_dim * bytes_of(shape.kind), shape.key_dim, to + q * shape.key_dim);
}

static void attend_all(const Piece *pieces, Py_ssize_t count, Shape shape, int threads, float *scratch, char *output) {
    const Py_ssize_t rows = shape.group, part = rows * shape.value_dim;
    float *peaks = scratch + count * part, *masses = peaks + count * rows;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1)
    for (Py_ssize_t p = 0; p < count; p++)
        attend(pieces[p], shape, scratch + p * part, peaks + p * rows, masses + p * rows);
    for (Py_ssize_t p = 0, next; p < count; p = next) {
        for (next = p + 1; next < count && pieces[next].head == pieces[p].head;) next++;
        merge(pieces + p, next - p, shape, scratch + p * part, peaks + p * rows, masses + p * rows, output);
    }
}

/* One run: (first head, heads, slots, keys, values, bias, and the strides of a head in each). */
typedef struct {
    Py_ssize_t first, heads, slots;
    unsigned long long keys, values, bias;
    Py_ssize_t key_stride, value_stride, bias_stride;
} Run;

static int read_run(PyObject *item, Run *run) {
    return PyArg_ParseTuple(
        item, "nnnKKKnnn;a run", &run->first, &run->heads, &run->slots, &run->keys, &run->values, &run->bias,
        &run->key_stride, &run->value_stride, &run->bias_stride);
}

static Py_ssize_t cut(const Run *run, Shape shape, const float *queries, Py_ssize_t length, Piece *to) {
    Py_ssize_t count = 0;
    for (Py_ssize_t head = 0; head < run->heads; head++)
        for (Py_ssize_t first = 0; first < run->slots; first += length)
            to[count++] = (Piece){
                .queries = queries + (run->first + head) * shape.group * shape.key_dim,
                .keys = (const char *)(uintptr_t)run->keys + head * run->key_stride * bytes_of(shape.kind),
                .values = (const char *)(uintptr_t)run->values + head * run->value_stride * bytes_of(shape.kind),
                .bias = run->bias ? (const float *)(uintptr_t)run->bias + head * run->bias_stride : NULL,
                .first = first,
                .last = first + length < run->slots ? first + length : run->slots,
                .head = run->first + head,
            };
    return count;
}

static PyObject *py_attend(PyObject *Py_UNUSED(module), PyObject *arguments) {
    unsigned long long queries, output, scratch;
    Py_ssize_t heads, count, length, filled = 0;
    int threads;
    Shape shape;
    PyObject *runs;
    if (!PyArg_ParseTuple(
            arguments, "iKKKnnnifnnnO!", &shape.kind, &queries, &output, &scratch, &heads, &count, &length, &threads,
            &shape.scale, &shape.group, &shape.key_dim, &shape.value_dim, &PyList_Type, &runs))
        return NULL;
    float *asked = (float *)(uintptr_t)scratch;
    Piece *pieces = PyMem_RawMalloc(count * sizeof(Piece));
    if (!pieces) return PyErr_NoMemory();
    for (Py_ssize_t r = 0; r < PyList_GET_SIZE(runs); r++) {
        Run run;
        if (!read_run(PyList_GET_ITEM(runs, r), &run)) {
            PyMem_RawFree(pieces);
            return NULL;
        }
        if (length < 1 || run.heads * ((run.slots + length - 1) / length) > count - filled) {
            PyMem_RawFree(pieces);
            PyErr_SetString(PyExc_ValueError, "the runs have more pieces than there is scratch for");
            return NULL;
        }
        filled += cut(&run, shape, asked, length, pieces + filled);
    }
    Py_BEGIN_ALLOW_THREADS
    widen_all((const char *)(uintptr_t)queries, heads * shape.group, shape, asked);
    asked += heads * shape.group * shape.key_dim;
    attend_all(pieces, filled, shape, threads, asked, (char *)(uintptr_t)output);
    Py_END_ALLOW_THREADS
    PyMem_RawFree(pieces);
    Py_RETURN_NONE;
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
    {"attend", py_attend, METH_VARARGS, "Attention of one token's queries over ragged runs; see _decode.pyi."},
    {"use", py_use, METH_VARARGS, "Which instructions: 0 any CPU's, 1 AVX2, 2 AVX-512; whether this CPU has them."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_decode", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__decode(void) {
    for (int level = 2; !(attend = code_for(level));) level--;
    return PyModule_Create(&module);
}
