/* Attention of several tokens over ragged runs of slots with β and, causally, over their own keys: bfloat16, on CPUs
 * with AMX.
 *
 * An item of work is one KV head with one block of tokens. Its rows are these tokens' queries of all query heads of
 * the group. Keys and values are packed for the tile unit, KEYS slots at a time, once for all rows, so the size of the
 * scratch does not depend on the number of slots or tokens. Softmax is online (Milakov & Gimelshein,
 * arXiv:1805.02867). The output of a row depends only on its own keys, not on blocks or the number of threads.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

static int usable; /* set when the module is loaded: true if the CPU and the system allow AMX */

static PyObject *refused(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(arguments)) {
    PyErr_SetString(PyExc_NotImplementedError, "this CPU, or this build of agentmem, has no AMX");
    return NULL;
}

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROWS 128 /* queries of an item */
#define KEYS 256 /* slots that are packed at a time */
#define PART 32  /* rows that attend to the packed slots at a time: those of two tiles */
#define TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINE TARGET __attribute__((always_inline)) static inline
/* Makes the compiler finish all writes to memory before tiles are loaded: it assumes that such loads read none. */
#define WRITTEN(address) __asm__ volatile("" : : "r"(address) : "memory")

typedef uint16_t brain; /* bfloat16 */

/* The slots of the KV heads first .. first + heads, or the keys of the queries' own tokens (own), which are causal. */
typedef struct {
    Py_ssize_t first, heads, slots;
    const brain *keys, *values;
    const float *bias; /* NULL if no slot has a β */
    Py_ssize_t key_head, key_slot, value_head, value_slot, bias_head; /* strides */
    int own;
} Run;

typedef struct {
    const brain *queries;
    brain *output;
    Py_ssize_t query_head, query_token, output_head, output_token; /* strides */
    Py_ssize_t tokens, heads, group, key_dim, value_dim, window;   /* window: 0 for none */
    Py_ssize_t depth, width, block; /* dims rounded up to multiples of 32 for the tiles; tokens of an item */
    float scale;
    const Run *runs;
    Py_ssize_t run_count;
} Problem;

/* The working memory of one thread. */
typedef struct {
    brain *queries, *keys, *values, *weights; /* [ROWS, depth]; tiles; tiles; [PART, KEYS] */
    float *logits, *sums, *bias, *peak, *mass; /* [PART, KEYS], [ROWS, width], [KEYS], [ROWS], [ROWS] */
} Scratch;

static size_t scratch_bytes(Py_ssize_t depth, Py_ssize_t width) {
    size_t narrow = ROWS * depth + KEYS * (depth + width) + PART * KEYS;
    return 2 * narrow + 4 * (PART * KEYS + ROWS * width + KEYS + 2 * ROWS);
}

static Scratch laid_out(char *at, Py_ssize_t depth, Py_ssize_t width) {
    Scratch s;
    s.queries = (brain *)at;
    s.keys = s.queries + ROWS * depth;
    s.values = s.keys + KEYS * depth;
    s.weights = s.values + KEYS * width;
    s.logits = (float *)(s.weights + PART * KEYS);
    s.sums = s.logits + PART * KEYS;
    s.bias = s.sums + ROWS * width;
    s.peak = s.bias + KEYS;
    s.mass = s.peak + ROWS;
    return s;
}

INLINE __mmask32 first_of(Py_ssize_t count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

/* Transposes a matrix of sixteen vectors of sixteen 32-bit numbers. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

/* Packs n keys as right-hand tiles of [16 keys] x [32 dims]; a row of a tile is a pair of dims. Zeros fill the rest. */
TARGET static void pack_keys(const Problem *p, const brain *keys, Py_ssize_t stride, Py_ssize_t n, brain *to) {
    for (Py_ssize_t key = 0; key < n; key += 16)
        for (Py_ssize_t dim = 0; dim < p->depth; dim += 32, to += 512) {
            __mmask32 there = first_of(p->key_dim - dim);
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = key + i < n ? _mm512_maskz_loadu_epi16(there, keys + (key + i) * stride + dim)
                                   : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, r[i]);
        }
    if ((n + 15) / 16 % 2) memset(to, 0, 32 * p->depth); /* tiles are used in pairs */
}

/* Packs n values as right-hand tiles of [32 slots] x [16 dims]; a row of a tile is a pair of slots. */
TARGET static void pack_values(const Problem *p, const brain *values, Py_ssize_t stride, Py_ssize_t n, brain *to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (Py_ssize_t slot = 0; slot < n; slot += 32)
        for (Py_ssize_t dim = 0; dim < p->width; dim += 32, to += 1024)
            for (Py_ssize_t pair = 0; pair < 16; pair++) {
                const Py_ssize_t left = n - slot - 2 * pair;
                const brain *from = values + (slot + 2 * pair) * stride + dim;
                __mmask32 there = first_of(p->value_dim - dim);
                __m512i even = _mm512_maskz_loadu_epi16(left > 0 ? there : 0, left > 0 ? from : values);
                __m512i odd = _mm512_maskz_loadu_epi16(left > 1 ? there : 0, left > 1 ? from + stride : values);
                _mm512_store_si512(to + 32 * pair, _mm512_permutex2var_epi16(even, low, odd));
                _mm512_store_si512(to + 512 + 32 * pair, _mm512_permutex2var_epi16(even, high, odd));
            }
}

/* Packs the queries of an item as rows, ordered by token and then by head; zeros fill the last part. */
TARGET static void pack_queries(const Problem *p, Py_ssize_t head, Py_ssize_t token, Py_ssize_t rows, Scratch s) {
    for (Py_ssize_t row = 0; row < (rows + PART - 1) / PART * PART; row++)
        for (Py_ssize_t dim = 0; dim < p->depth; dim += 32) {
            const brain *from = p->queries + (head * p->group + row % p->group) * p->query_head +
                                (token + row / p->group) * p->query_token + dim;
            __mmask32 there = row < rows ? first_of(p->key_dim - dim) : 0;
            _mm512_store_si512(
                s.queries + row * p->depth + dim, _mm512_maskz_loadu_epi16(there, there ? from : p->queries));
        }
}

/* Computes the logits of a part's rows for the packed keys first .. last, which are multiples of 32. */
TARGET static void multiply_keys(
    const Problem *p, const brain *queries, Py_ssize_t first, Py_ssize_t last, Scratch s
) {
    const Py_ssize_t stride = 2 * p->depth, tile = 16 * p->depth;
    WRITTEN(s.keys);
    for (Py_ssize_t key = first; key < last; key += 32) {
        const brain *keys = s.keys + key * p->depth;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (Py_ssize_t dim = 0; dim < p->depth; dim += 32) {
            _tile_loadd(4, queries + dim, stride);
            _tile_loadd(6, keys + dim * 16, 64);
            _tile_loadd(5, queries + tile + dim, stride);
            _tile_loadd(7, keys + tile + dim * 16, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, s.logits + key, 4 * KEYS);
        _tile_stored(1, s.logits + key + 16, 4 * KEYS);
        _tile_stored(2, s.logits + 16 * KEYS + key, 4 * KEYS);
        _tile_stored(3, s.logits + 16 * KEYS + key + 16, 4 * KEYS);
    }
}

/* Adds the weighted values of the slots first .. last, which are multiples of 32, to the sums of a part's rows. */
TARGET static void multiply_values(const Problem *p, float *sums, Py_ssize_t first, Py_ssize_t last, Scratch s) {
    const Py_ssize_t stride = 4 * p->width;
    WRITTEN(sums);
    for (Py_ssize_t dim = 0; dim < p->width; dim += 32) {
        _tile_loadd(0, sums + dim, stride);
        _tile_loadd(1, sums + dim + 16, stride);
        _tile_loadd(2, sums + 16 * p->width + dim, stride);
        _tile_loadd(3, sums + 16 * p->width + dim + 16, stride);
        for (Py_ssize_t slot = first; slot < last; slot += 32) {
            const brain *values = s.values + slot * p->width + 32 * dim;
            _tile_loadd(4, s.weights + slot, 2 * KEYS);
            _tile_loadd(6, values, 64);
            _tile_loadd(5, s.weights + 16 * KEYS + slot, 2 * KEYS);
            _tile_loadd(7, values + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums + dim, stride);
        _tile_stored(1, sums + dim + 16, stride);
        _tile_stored(2, sums + 16 * p->width + dim, stride);
        _tile_stored(3, sums + 16 * p->width + dim + 16, stride);
    }
}

/* Returns 2^x for x <= 0 with a relative error of 3e-6: a polynomial of the fraction of x, scaled by its integer. */
INLINE __m512 power_of_two(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, 0x09); /* x - floor(x), without a floating-point exception */
    __m512 y = _mm512_fmadd_ps(f, _mm512_set1_ps(1.342669e-2f), _mm512_set1_ps(5.224247e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4128021e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9304484e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, x);
}

/* Returns sixteen logits of a row from `at` on, as exponents of 2, with β added. */
INLINE __m512 powers(const float *row, const float *bias, Py_ssize_t at, __m512 scale) {
    return _mm512_fmadd_ps(_mm512_load_ps(row + at), scale, _mm512_load_ps(bias + at));
}

/* Returns a mask of which of the sixteen slots from `at` on lie in low .. high. */
INLINE __mmask16 between(Py_ssize_t at, Py_ssize_t low, Py_ssize_t high) {
    __mmask16 seen = 0xffff;
    if (at < low) seen &= (__mmask16)(0xffffu << (low - at));
    if (at + 16 > high) seen &= (__mmask16)(0xffffu >> (at + 16 - high));
    return seen;
}

/* Turns a row's logits for the slots low .. high into weights. All other weights in first .. last (multiples of 32)
 * are set to 0. */
INLINE void soften(
    const Problem *p, const float *row, const float *bias, Py_ssize_t low, Py_ssize_t high, Py_ssize_t first,
    Py_ssize_t last, brain *weights, float *sums, float *peak, float *mass
) {
    const __m512 scale = _mm512_set1_ps(p->scale), lowest = _mm512_set1_ps(-INFINITY);
    const Py_ssize_t begin = low / 16 * 16;
    const Py_ssize_t inner = (low + 15) / 16 * 16, outer = high / 16 * 16;
    __m512 tops = lowest, total = _mm512_setzero_ps();
    if (begin < inner && begin < high)
        tops = _mm512_mask_mov_ps(tops, between(begin, low, high), powers(row, bias, begin, scale));
    for (Py_ssize_t at = inner; at < outer; at += 16) tops = _mm512_max_ps(powers(row, bias, at, scale), tops);
    if (outer >= inner && outer < high)
        tops = _mm512_mask_max_ps(tops, between(outer, low, high), powers(row, bias, outer, scale), tops);
    float top = _mm512_reduce_max_ps(_mm512_max_ps(tops, _mm512_set1_ps(*peak)));
    if (top > *peak) {
        __m512 shrink = power_of_two(_mm512_set1_ps(*peak - top));
        for (Py_ssize_t dim = 0; dim < p->width; dim += 16)
            _mm512_store_ps(sums + dim, _mm512_mul_ps(_mm512_load_ps(sums + dim), shrink));
        *mass *= _mm512_cvtss_f32(shrink);
        *peak = top;
    }
    if (top == -INFINITY) top = 0.0f; /* no logit above -inf so far: weights are 0, or NaN for a NaN logit */
    const __m512 peaks = _mm512_set1_ps(top);
    for (Py_ssize_t at = first; at < last; at += 32) {
        __m512 two[2];
        for (int i = 0; i < 2; i++) {
            Py_ssize_t from = at + 16 * i;
            if (from >= high || from + 16 <= low) two[i] = _mm512_setzero_ps();
            else {
                two[i] = power_of_two(_mm512_sub_ps(powers(row, bias, from, scale), peaks));
                if (from < low || from + 16 > high) two[i] = _mm512_maskz_mov_ps(between(from, low, high), two[i]);
            }
            total = _mm512_add_ps(total, two[i]);
        }
        _mm512_store_si512(weights + at, (__m512i)_mm512_cvtne2ps_pbh(two[1], two[0]));
    }
    *mass += _mm512_reduce_add_ps(total);
}

/* Sets low .. high to the slots of a run that a token attends to. */
INLINE void seen_by(const Problem *p, const Run *run, Py_ssize_t token, Py_ssize_t *low, Py_ssize_t *high) {
    *high = run->own ? token + 1 : run->slots;
    *low = p->window ? (run->own ? 0 : run->slots) + token + 1 - p->window : 0;
    if (*low < 0) *low = 0;
}

/* Lets all rows of an item attend to the packed slots at .. at + n of a run. */
TARGET static void see(const Problem *p, const Run *run, Py_ssize_t token, Py_ssize_t rows, Py_ssize_t at, Py_ssize_t n,
                       Scratch s) {
    for (Py_ssize_t part = 0; part < rows; part += PART) {
        const Py_ssize_t end = part + PART < rows ? part + PART : rows;
        Py_ssize_t low, high, first, last;
        seen_by(p, run, token + part / p->group, &first, &high);
        seen_by(p, run, token + (end - 1) / p->group, &low, &last);
        first = first > at ? (first - at) / 32 * 32 : 0; /* the first row sees least of the end, the last least of the */
        last = (last < at + n ? last - at : n);          /* beginning */
        last = (last + 31) / 32 * 32;
        if (first >= last) continue;
        multiply_keys(p, s.queries + part * p->depth, first, last, s);
        for (Py_ssize_t row = part; row < end; row++) {
            seen_by(p, run, token + row / p->group, &low, &high);
            low = low > at ? low - at : 0;
            high = high < at + n ? high - at : n;
            if (low > n) low = n;
            if (high < low) high = low;
            soften(p, s.logits + (row - part) * KEYS, s.bias, low, high, first, last, s.weights + (row - part) * KEYS,
                   s.sums + row * p->width, s.peak + row, s.mass + row);
        }
        multiply_values(p, s.sums + part * p->width, first, last, s);
    }
}

TARGET static void set_bias(const float *from, Py_ssize_t n, float *to) {
    for (Py_ssize_t i = 0; i < n; i += 16) {
        __m512 bias = _mm512_setzero_ps();
        if (from) bias = _mm512_maskz_loadu_ps((__mmask16)first_of(n - i), from + i);
        _mm512_store_ps(to + i, _mm512_mul_ps(bias, _mm512_set1_ps(1.44269504088896341f)));
    }
}

TARGET static void write_rows(const Problem *p, Py_ssize_t head, Py_ssize_t token, Py_ssize_t rows, Scratch s) {
    for (Py_ssize_t row = 0; row < rows; row++) {
        brain *to = p->output + (head * p->group + row % p->group) * p->output_head +
                    (token + row / p->group) * p->output_token;
        const __m512 share = _mm512_set1_ps(1.0f / s.mass[row]);
        const float *sums = s.sums + row * p->width;
        for (Py_ssize_t dim = 0; dim < p->value_dim; dim += 32) {
            __m512 low = _mm512_mul_ps(_mm512_load_ps(sums + dim), share);
            __m512 high = _mm512_mul_ps(_mm512_load_ps(sums + dim + 16), share);
            _mm512_mask_storeu_epi16(
                to + dim, first_of(p->value_dim - dim), (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

/* Computes one item: a KV head's queries of the block of tokens that begins with `token`. */
TARGET static void attend_item(const Problem *p, Py_ssize_t head, Py_ssize_t token, Scratch s) {
    const Py_ssize_t tokens = token + p->block < p->tokens ? p->block : p->tokens - token, rows = tokens * p->group;
    pack_queries(p, head, token, rows, s);
    for (Py_ssize_t row = 0; row < rows; row++) {
        s.peak[row] = -INFINITY;
        s.mass[row] = 0.0f;
    }
    memset(s.sums, 0, 4 * ROWS * p->width);
    memset(s.weights, 0, 2 * PART * KEYS);
    for (const Run *run = p->runs; run < p->runs + p->run_count; run++) {
        Py_ssize_t index = head - run->first, low, high, unused;
        if (index < 0 || index >= run->heads) continue;
        seen_by(p, run, token, &low, &unused);
        seen_by(p, run, token + tokens - 1, &unused, &high);
        for (Py_ssize_t at = low / KEYS * KEYS; at < high; at += KEYS) {
            const Py_ssize_t n = high - at < KEYS ? high - at : KEYS;
            pack_keys(p, run->keys + index * run->key_head + at * run->key_slot, run->key_slot, n, s.keys);
            pack_values(p, run->values + index * run->value_head + at * run->value_slot, run->value_slot, n, s.values);
            set_bias(run->bias ? run->bias + index * run->bias_head + at : NULL, n, s.bias);
            see(p, run, token, rows, at, n, s);
        }
    }
    write_rows(p, head, token, rows, s);
}

/* All tiles have 16 rows of 64 bytes. */
TARGET static void configure(void) {
    struct { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    WRITTEN(&tiles);
    _tile_loadconfig(&tiles);
}

/* Returns the tokens of an item. They are fewer if there were else too few items for all threads, although the same
 * slots are then packed more often. */
static Py_ssize_t block_of(const Problem *p, int threads) {
    Py_ssize_t rows = ROWS;
    while (rows > PART && (p->tokens * p->group + rows - 1) / rows * p->heads < 2 * threads) rows /= 2;
    return rows < p->group ? 1 : rows / p->group;
}

/* Returns whether there is so little to compute that more threads would cost more time than they save. */
static int is_small(const Problem *p) {
    Py_ssize_t slots = 0;
    for (const Run *run = p->runs; run < p->runs + p->run_count; run++) slots += run->heads * run->slots;
    return slots * p->group * p->tokens * (p->depth + p->width) < 2 << 20;
}

/* Computes items until none is left, beginning with those that attend to the most slots. */
TARGET static void attend_some(const Problem *p, Py_ssize_t *next, Py_ssize_t blocks, char *scratch) {
    Scratch s = laid_out(scratch, p->depth, p->width);
    configure();
    for (Py_ssize_t item; (item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < blocks * p->heads;)
        attend_item(p, item % p->heads, (blocks - 1 - item / p->heads) * p->block, s);
    _tile_release();
}

static void attend_all(const Problem *p, int threads, char *scratch) {
    const Py_ssize_t blocks = (p->tokens + p->block - 1) / p->block;
    const size_t size = scratch_bytes(p->depth, p->width);
    Py_ssize_t next = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1 && !is_small(p))
    for (int thread = 0; thread < threads; thread++) attend_some(p, &next, blocks, scratch + thread * size);
}

static int available(void) {
    unsigned a, b, c, d, e, unused;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl") || !__get_cpuid_count(7, 0, &a, &b, &c, &d) ||
        !__get_cpuid_count(7, 1, &e, &unused, &unused, &unused))
        return 0;
    if (!(d >> 22 & d >> 24 & e >> 5 & 1)) return 0; /* AMX-BF16, AMX-TILE, AVX512-BF16 */
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* asks the kernel to save tiles when it switches threads */
}

static int read_run(PyObject *item, Run *run) {
    unsigned long long keys, values, bias;
    if (!PyArg_ParseTuple(
            item, "nnnKKKnnnnnp;a run", &run->first, &run->heads, &run->slots, &keys, &values, &bias, &run->key_head,
            &run->value_head, &run->bias_head, &run->key_slot, &run->value_slot, &run->own))
        return 0;
    run->keys = (const brain *)(uintptr_t)keys;
    run->values = (const brain *)(uintptr_t)values;
    run->bias = (const float *)(uintptr_t)bias;
    return 1;
}

static Run *read_runs(PyObject *list) {
    Run *runs = PyMem_RawMalloc(PyList_GET_SIZE(list) * sizeof(Run));
    if (!runs) return (Run *)PyErr_NoMemory();
    for (Py_ssize_t r = 0; r < PyList_GET_SIZE(list); r++)
        if (!read_run(PyList_GET_ITEM(list, r), runs + r)) {
            PyMem_RawFree(runs);
            return NULL;
        }
    return runs;
}

static PyObject *py_attend(PyObject *module, PyObject *arguments) {
    unsigned long long queries, output, scratch, size;
    Problem p = {0};
    int threads;
    PyObject *list;
    if (!PyArg_ParseTuple(
            arguments, "KKKKif(nn)(nn)nnnnnnO!", &queries, &output, &scratch, &size, &threads, &p.scale, &p.query_head,
            &p.query_token, &p.output_head, &p.output_token, &p.tokens, &p.heads, &p.group, &p.key_dim, &p.value_dim,
            &p.window, &PyList_Type, &list))
        return NULL;
    p.depth = (p.key_dim + 31) / 32 * 32;
    p.width = (p.value_dim + 31) / 32 * 32;
    if (!usable) return refused(module, arguments);
    if (p.group < 1 || p.group > ROWS || threads < 1 || size < threads * scratch_bytes(p.depth, p.width))
        return PyErr_Format(PyExc_ValueError, "a group of %zd rows, or scratch of %llu bytes, does not do", p.group, size);
    Run *runs = read_runs(list);
    if (!runs) return NULL;
    p.queries = (const brain *)(uintptr_t)queries;
    p.output = (brain *)(uintptr_t)output;
    p.scale *= 1.44269504088896341f;
    p.runs = runs;
    p.run_count = PyList_GET_SIZE(list);
    p.block = block_of(&p, threads);
    Py_BEGIN_ALLOW_THREADS
    attend_all(&p, threads, (char *)(uintptr_t)scratch);
    Py_END_ALLOW_THREADS
    PyMem_RawFree(runs);
    Py_RETURN_NONE;
}

static PyObject *py_scratch_bytes(PyObject *Py_UNUSED(module), PyObject *arguments) {
    Py_ssize_t key_dim, value_dim;
    if (!PyArg_ParseTuple(arguments, "nn", &key_dim, &value_dim)) return NULL;
    return PyLong_FromSize_t(scratch_bytes((key_dim + 31) / 32 * 32, (value_dim + 31) / 32 * 32));
}

#else
static int available(void) { return 0; }

#define py_attend refused
#define py_scratch_bytes refused
#endif

static PyObject *py_available(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(arguments)) {
    return PyBool_FromLong(usable);
}

static PyMethodDef methods[] = {
    {"attend", py_attend, METH_VARARGS, "Attention of a chunk's queries over ragged runs; see _chunk.pyi."},
    {"scratch_bytes", py_scratch_bytes, METH_VARARGS, "Bytes that a thread works in, from the dims of keys and values."},
    {"available", py_available, METH_NOARGS, "Whether this CPU has what it takes."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_chunk", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__chunk(void) {
    usable = available();
    return PyModule_Create(&module);
}
