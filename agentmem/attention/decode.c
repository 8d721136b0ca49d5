/* Decode steps on the CPU: one token of each of several sequences attends to its slots with β. Sums are float32.
 *
 * torch's fused kernel has one task per head and reads keys as a small matrix product. This code reads keys and values
 * once for all queries of a group, at nearly the speed of a plain sum, and divides the slots of all heads of all
 * sequences between the threads. Softmax is online over tiles of slots (Milakov & Gimelshein, arXiv:1805.02867), and
 * the pieces of a head are merged by their log-masses (Flash-Decoding). decode_kernel.h has the arithmetic, which is
 * compiled once for each instruction set.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "decode_piece.h"

#define LEAST 256 /* least slots of a share, on average: fewer do not justify another thread */
#define SHARES 2  /* shares per thread, so that other threads can take over a share of a slow thread */

/* Returns the code for an instruction set (0 any CPU, 1 AVX2, 2 AVX-512), or NULL if this CPU lacks the set. */
static const Code *code_for(int level) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (level == 2 && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return &decode_avx512;
    if (level == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return &decode_avx2;
#endif
    return level == 0 ? &decode_portable : NULL;
}

static const Code *code = &decode_portable;

/* Computes all pieces, one share at a time; share s consists of the pieces begins[s] .. begins[s + 1]. */
static void serve_all(
    const Piece *pieces, const Py_ssize_t *begins, Py_ssize_t shares, const Shape *shape, int threads
) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && shares > 1)
    for (Py_ssize_t s = 0; s < shares; s++)
        for (Py_ssize_t p = begins[s]; p < begins[s + 1]; p++) code->serve(pieces + p, shape);
    for (Py_ssize_t p = 0; p < begins[shares]; p++)
        if (pieces[p].of > 1) code->merge(pieces + p, pieces[p].of, shape);
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
 * a head are at multiples of WHOLE slots. */
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
        next = rest.first + (cut->left + WHOLE - 1) / WHOLE * WHOLE;
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
    const int plain = shape->keys == shape->kind && shape->values == shape->kind;
    const int coded = (shape->keys == INT8 || shape->keys == INT4) && (shape->values == shape->keys || shape->values == INT4);
    if (coded && (shape->key_dim % GROUP || shape->value_dim % GROUP)) {
        PyErr_SetString(PyExc_ValueError, "dims of quantised slots that are no whole groups");
        return 0;
    }
    if (shape->kind < FLOAT32 || shape->kind > FLOAT16 || !(plain || coded) || shape->heads < 1 || shape->group < 1 || step->threads < 1 ||
        shape->key_dim < WHOLE || shape->key_dim % WHOLE || shape->value_dim < WHOLE || shape->value_dim % WHOLE || shape->window < 0) {
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
            arguments, "iiiifnnnnnnK(nn)K(nn)K(nn)KKnO!", &shape->kind, &shape->keys, &shape->values, &step.threads, &shape->scale, &shape->window,
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
    const Code *found = code_for(level);
    if (!found) Py_RETURN_FALSE;
    code = found;
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
    for (int level = 2; !(code = code_for(level));) level--;
    return PyModule_Create(&module);
}
