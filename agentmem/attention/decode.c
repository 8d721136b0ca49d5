/* One decode step: a few queries of each KV head over that head's slots with β, float32, on CPU.
 *
 * torch's fused kernel has one task a head and reads keys as a small matrix product; this one reads keys and values
 * once for all queries of a group, at nearly the speed of a plain sum, and shares every head out between the threads.
 * Softmax is online over tiles of slots (Milakov & Gimelshein, arXiv:1805.02867), and the pieces of a head are merged
 * by their log-masses (Flash-Decoding). No -ffast-math: it would change the whole process's rounding of small numbers.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>

#define WIDE 16  /* floats of one vector: a register of AVX-512, two of AVX2, four of SSE and NEON */
#define TILE 128 /* slots whose weights are kept at a time */

typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef float loose __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef int32_t wide_int __attribute__((vector_size(4 * WIDE)));
#define INLINE static inline __attribute__((always_inline))

/* Slots first .. last of one KV head, its queries, and where the unfinished answer goes. */
typedef struct {
    const float *queries, *keys, *values, *bias; /* bias: NULL while no slot carries a β */
    Py_ssize_t first, last, head;
} Piece;

typedef struct {
    Py_ssize_t group, key_dim, value_dim;
    float scale;
} Shape;

INLINE wide load(const float *from) { return *(const loose *)from; }
INLINE void store(float *to, wide x) { *(loose *)to = x; }

static const wide none = {0};

INLINE wide choose(wide_int which, wide yes, wide no) {
    return (wide)(((wide_int)yes & which) | ((wide_int)no & ~which));
}

INLINE float largest(wide x) {
    float top = x[0];
    for (int i = 1; i < WIDE; i++) top = x[i] > top ? x[i] : top;
    return top;
}

INLINE float sum(wide x) {
    union { wide all; float lane[WIDE]; } u = {x};
    float eight[8], four[4];
    for (int i = 0; i < 8; i++) eight[i] = u.lane[i] + u.lane[i + 8];
    for (int i = 0; i < 4; i++) four[i] = eight[i] + eight[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

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

/* Logits of `count` queries, a compile-time number, over the n slots of a tile. */
INLINE void logits(const int count, const float *queries, const float *keys, Py_ssize_t dim, Py_ssize_t n, float *to) {
    for (Py_ssize_t j = 0; j < n; j++) {
        wide product[4] = {{0}};
        for (Py_ssize_t i = 0; i < dim; i += WIDE) {
            wide key = load(keys + j * dim + i);
            for (int g = 0; g < count; g++) product[g] += load(queries + g * dim + i) * key;
        }
        for (int g = 0; g < count; g++) to[g * TILE + j] = sum(product[g]);
    }
}

/* Adds the n weighted values of a tile to the outputs of `count` queries, two vectors of each at a time. */
INLINE void mix(
    const int count, const int vectors, const float *weights, const float *values, Py_ssize_t dim, Py_ssize_t n,
    float *to
) {
    wide total[4][2];
    for (int g = 0; g < count; g++)
        for (int v = 0; v < vectors; v++) total[g][v] = load(to + g * dim + v * WIDE);
    for (Py_ssize_t j = 0; j < n; j++)
        for (int v = 0; v < vectors; v++) {
            wide value = load(values + j * dim + v * WIDE);
            for (int g = 0; g < count; g++) total[g][v] += weights[g * TILE + j] * value;
        }
    for (int g = 0; g < count; g++)
        for (int v = 0; v < vectors; v++) store(to + g * dim + v * WIDE, total[g][v]);
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
INLINE void some(const int count, Piece piece, Shape shape, Py_ssize_t group, float *output, float *peak, float *mass) {
    float row[4 * TILE] __attribute__((aligned(64)));
    const float *queries = piece.queries + group * shape.key_dim;
    const Py_ssize_t dim = shape.value_dim;
    for (int g = 0; g < count; g++) {
        peak[g] = -INFINITY;
        mass[g] = 0.0f;
        for (Py_ssize_t i = 0; i < dim; i++) output[g * dim + i] = 0.0f;
    }
    for (Py_ssize_t at = piece.first; at < piece.last; at += TILE) {
        Py_ssize_t n = piece.last - at < TILE ? piece.last - at : TILE;
        const float *keys = piece.keys + at * shape.key_dim, *values = piece.values + at * dim;
        if (shape.key_dim == 64) logits(count, queries, keys, 64, n, row);
        else if (shape.key_dim == 128) logits(count, queries, keys, 128, n, row);
        else logits(count, queries, keys, shape.key_dim, n, row);
        for (int g = 0; g < count; g++)
            soften(row + g * TILE, piece.bias ? piece.bias + at : NULL, shape, n, output + g * dim, peak + g, mass + g);
        Py_ssize_t i = 0;
        for (; i + 2 * WIDE <= dim; i += 2 * WIDE) mix(count, 2, row, values + i, dim, n, output + i);
        for (; i < dim; i += WIDE) mix(count, 1, row, values + i, dim, n, output + i);
    }
}

/* All queries of a piece, at most four at a time. */
INLINE void whole(Piece piece, Shape shape, float *output, float *peak, float *mass) {
    Py_ssize_t g = 0;
    for (; g + 4 <= shape.group; g += 4) some(4, piece, shape, g, output + g * shape.value_dim, peak + g, mass + g);
    output += g * shape.value_dim, peak += g, mass += g;
    if (shape.group - g == 3) some(3, piece, shape, g, output, peak, mass);
    if (shape.group - g == 2) some(2, piece, shape, g, output, peak, mass);
    if (shape.group - g == 1) some(1, piece, shape, g, output, peak, mass);
}

typedef void (*Attend)(Piece, Shape, float *, float *, float *);
static void portable(Piece p, Shape s, float *output, float *peak, float *mass) { whole(p, s, output, peak, mass); }
#ifdef __x86_64__
__attribute__((target("avx2,fma"))) static void avx2(Piece p, Shape s, float *output, float *peak, float *mass) {
    whole(p, s, output, peak, mass);
}
__attribute__((target("avx512f,avx512dq,avx512vl,fma"))) static void avx512(
    Piece p, Shape s, float *output, float *peak, float *mass
) {
    whole(p, s, output, peak, mass);
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

/* One head's answer out of its pieces: each counts by its mass. */
static void merge(
    const Piece *pieces, Py_ssize_t count, Shape shape, const float *parts, const float *peaks, const float *masses,
    float *output
) {
    for (Py_ssize_t g = 0; g < shape.group; g++) {
        float top = -INFINITY, total = 0.0f, *to = output + (pieces->head * shape.group + g) * shape.value_dim;
        for (Py_ssize_t p = 0; p < count; p++) top = fmaxf(top, peaks[p * shape.group + g]);
        for (Py_ssize_t i = 0; i < shape.value_dim; i++) to[i] = 0.0f;
        for (Py_ssize_t p = 0; p < count; p++) {
            Py_ssize_t at = p * shape.group + g;
            float share = expf(peaks[at] - top);
            total += share * masses[at];
            for (Py_ssize_t i = 0; i < shape.value_dim; i++) to[i] += share * parts[at * shape.value_dim + i];
        }
        for (Py_ssize_t i = 0; i < shape.value_dim; i++) to[i] /= total;
    }
}

static void attend_all(const Piece *pieces, Py_ssize_t count, Shape shape, int threads, float *scratch, float *output) {
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
                .keys = (const float *)(uintptr_t)run->keys + head * run->key_stride,
                .values = (const float *)(uintptr_t)run->values + head * run->value_stride,
                .bias = run->bias ? (const float *)(uintptr_t)run->bias + head * run->bias_stride : NULL,
                .first = first,
                .last = first + length < run->slots ? first + length : run->slots,
                .head = run->first + head,
            };
    return count;
}

static PyObject *py_attend(PyObject *Py_UNUSED(module), PyObject *arguments) {
    unsigned long long queries, output, scratch;
    Py_ssize_t count, length, filled = 0;
    int threads;
    Shape shape;
    PyObject *runs;
    if (!PyArg_ParseTuple(
            arguments, "KKKnnifnnnO!", &queries, &output, &scratch, &count, &length, &threads, &shape.scale,
            &shape.group, &shape.key_dim, &shape.value_dim, &PyList_Type, &runs))
        return NULL;
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
        filled += cut(&run, shape, (const float *)(uintptr_t)queries, length, pieces + filled);
    }
    Py_BEGIN_ALLOW_THREADS
    attend_all(pieces, filled, shape, threads, (float *)(uintptr_t)scratch, (float *)(uintptr_t)output);
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
