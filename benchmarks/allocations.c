/* Every allocation of a process: live and peak bytes of the malloc family, native libraries' own included.
 *
 * What MKL's products pack into goes to an account of its own: a buffer of megabytes for each thread, which MKL keeps,
 * so that it belongs to whichever call comes first to a thread. MKL is known by the names on the stack.
 *
 *     cc -O2 -shared -fPIC -o allocations.so allocations.c -ldl     and     LD_PRELOAD=allocations.so
 *
 * Sizes are the allocator's own (malloc_usable_size), so no table of blocks is needed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LARGE (1 << 16) /* bytes from which on the stack is looked at */
#define KEPT 1024       /* blocks of MKL's at a time */
#define KNOWN 65536     /* places in code whose library is remembered */

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

typedef struct { _Atomic long live, peak; } Account;
static Account others, products;
static _Atomic(void *) kept[KEPT];
static _Atomic uintptr_t known[KNOWN]; /* twice a place in code, plus 1 where it is MKL's */
static __thread int looking;

static void count(Account *account, long bytes) {
    long now = atomic_fetch_add(&account->live, bytes) + bytes, top = atomic_load(&account->peak);
    while (now > top && !atomic_compare_exchange_weak(&account->peak, &top, now)) {}
}
/* dladdr searches all names of a library, so it is asked once for each place. */
static int is_mkl(void *frame) {
    uintptr_t twice = (uintptr_t)frame << 1;
    _Atomic uintptr_t *entry = &known[(twice ^ twice >> 17) % KNOWN];
    uintptr_t found = atomic_load(entry);
    if ((found & ~(uintptr_t)1) != twice) {
        Dl_info at;
        found = twice | (dladdr(frame, &at) && at.dli_sname && !strncmp(at.dli_sname, "mkl_", 4));
        atomic_store(entry, found);
    }
    return found & 1;
}
static int called_by_mkl(void) {
    void *frames[12];
    if (looking) return 0;
    looking = 1;
    int found = 0, depth = backtrace(frames, 12);
    for (int i = 0; i < depth && !found; i++)
        found = is_mkl(frames[i]);
    looking = 0;
    return found;
}
static int swap_kept(void *before, void *after) {
    for (int i = 0; i < KEPT; i++) {
        void *expected = before;
        if (atomic_compare_exchange_strong(&kept[i], &expected, after)) return 1;
    }
    return 0;
}
static void *born(void *block) {
    if (!block) return block;
    long bytes = (long)malloc_usable_size(block);
    count(bytes >= LARGE && called_by_mkl() && swap_kept(NULL, block) ? &products : &others, bytes);
    return block;
}
static void died(void *block, long bytes) {
    count(bytes >= LARGE && swap_kept(block, NULL) ? &products : &others, -bytes);
}
void *malloc(size_t size) { return born(__libc_malloc(size)); }
void *calloc(size_t number, size_t size) { return born(__libc_calloc(number, size)); }
void *memalign(size_t alignment, size_t size) { return born(__libc_memalign(alignment, size)); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void **to, size_t alignment, size_t size) {
    void *block = memalign(alignment, size);
    if (!block) return ENOMEM;
    *to = block;
    return 0;
}
void free(void *block) {
    if (block) died(block, (long)malloc_usable_size(block));
    __libc_free(block);
}
/* The old and the new block may exist at once while it moves; the old one's bytes go when it has. */
void *realloc(void *block, size_t size) {
    long before = block ? (long)malloc_usable_size(block) : 0;
    void *moved = __libc_realloc(block, size);
    if (moved == block && moved) count(&others, (long)malloc_usable_size(moved) - before); /* MKL moves no block */
    else if (moved || !size) {
        born(moved);
        if (block) died(block, before);
    }
    return moved;
}

long allocations_live(void) { return others.live; }
long allocations_peak(void) { return others.peak; }
long allocations_products(void) { return products.peak; }
void allocations_restart(void) { others.peak = (long)others.live; }
